"""pyprune.ops as a package: what importing it costs, what it needs, what types it shows."""

import ast
import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
from support.paths import ROOT
from torch import Tensor
from torch.library import CustomOpDef

from pyprune import ops

STUB = ROOT / "pyprune" / "ops" / "__init__.pyi"


def run_python(code: str, **environment: str) -> str:
    """What the code prints in a process of its own."""
    shown = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


# A package that is not installed: no finder finds it.
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = {"transformers", "tokenizers", "huggingface_hub", "safetensors", "click", "rich", "matplotlib", "triton"}
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest))
"""
USE = """
import sys, torch
import pyprune.ops as ops
hessian = ops.Hessian.zeros(4)
hessian.update(torch.eye(4))
factor = ops.inverse_factor(hessian.finish(), 0.0).factor
assert torch.equal(factor, torch.eye(4))
print("transformers" in sys.modules)
"""


@pytest.mark.slow
def test_without_transformers() -> None:
    assert run_python(HIDE + USE) == "False\n"
    hidden = run_python(HIDE + "import importlib.util as u; print(u.find_spec('transformers'), u.find_spec('rich'))")
    assert hidden == "None None\n"


@pytest.mark.slow
def test_without_registration() -> None:
    count = "import sys, torch; before = len(sys.modules); import pyprune.ops; print(len(sys.modules) - before)\n"
    modules, transformers = run_python(count + USE, PYPRUNE_REGISTER="0").split()
    assert transformers == "False"
    # pyprune's own modules and a few of the standard library: the import takes as long as PyTorch's.
    assert int(modules) < 60


def annotated(signature: inspect.Signature) -> dict[str, str]:
    """Parameter or `return` to its annotation and default as the stub writes them."""
    shown = {name: str(parameter).partition(": ")[2] for name, parameter in signature.parameters.items()}
    shown["return"] = inspect.formatannotation(signature.return_annotation)
    return {name: text.replace("torch.", "").replace("'", "") for name, text in shown.items()}


def test_the_types_are_those_of_the_operators() -> None:
    tree = ast.parse(STUB.read_text())
    imported = {name.asname for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    written: dict[str, Any] = {"Tensor": Tensor}
    exec(compile(tree, str(STUB), "exec"), written | {"__package__": "pyprune.ops"}, written)
    operators = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert operators | imported - {None} == set(ops.__all__)
    assert operators == {name for name in ops.__all__ if isinstance(getattr(ops, name), CustomOpDef)}
    for name in operators:
        declared, own = inspect.signature(written[name]), inspect.signature(getattr(ops, name), eval_str=True)
        assert annotated(declared) == annotated(own), name
