"""pyprune.ops as a package: what importing it costs, what it needs, what types it shows."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
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


def test_without_transformers() -> None:
    assert run_python(HIDE + USE) == "False\n"
    hidden = run_python(HIDE + "import importlib.util as u; print(u.find_spec('transformers'), u.find_spec('rich'))")
    assert hidden == "None None\n"


@pytest.mark.slow
def test_without_registration() -> None:
    count = "import sys, torch; before = len(sys.modules); import pyprune.ops; print(len(sys.modules) - before)"
    assert run_python(USE, PYPRUNE_REGISTER="0") == "False\n"
    # pyprune's own modules and a few of the standard library: the import takes as long as PyTorch's.
    assert int(run_python(count, PYPRUNE_REGISTER="0")) < 60


@pytest.mark.slow
def test_registration_is_the_default() -> None:
    code = "import pyprune, transformers; print('pyprune_llama' in transformers.CONFIG_MAPPING.keys())"
    assert run_python(code) == "True\n"


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


CONSUMER = """
from torch import Tensor
from pyprune.ops import OPERATOR_VERSIONS, Hessian, InverseFactor, inverse_factor, rms_norm, spd_inverse, swiglu_

def factor_of(rows: Tensor) -> InverseFactor:
    hessian = Hessian.zeros(rows.shape[-1], sums=True)
    hessian.update(rows)
    return inverse_factor(hessian.finish(centred=True), damping=0.01)

def step(x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    normed = rms_norm(x, weight, 1e-6)
    swiglu_(normed, x)
    inverse, info = spd_inverse(normed, 0.1)
    return inverse + info, OPERATOR_VERSIONS["rms_norm"]
"""


STRICT = """
[[tool.mypy.overrides]]
module = ["right", "wrong"]
disallow_any_expr = true
disallow_untyped_calls = true
warn_return_any = true
"""


@pytest.mark.slow
def test_a_typed_caller(tmp_path: Path) -> None:
    """No expression of a caller is untyped. With the project's own settings but for that, to share its cache."""
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(CONSUMER)
    wrong = CONSUMER.replace("1e-6", "'1e-6'").replace("damping=0.01", "damping=None").replace("int]", "str]")
    (tmp_path / "wrong.py").write_text(wrong)
    settings = (ROOT / "pyproject.toml").read_text().replace('packages = ["pyprune"]', "")
    (tmp_path / "pyproject.toml").write_text(settings + STRICT)
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "pyproject.toml")]
    command += [str(tmp_path / "right.py"), str(tmp_path / "wrong.py")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 3, found.stdout + found.stderr
    assert not [line for line in errors if "wrong.py" not in line]
    for part in ('Argument "damping" to "inverse_factor"', 'Argument 3 to "rms_norm"', "tuple[Tensor, str]"):
        assert sum(part in line for line in errors) == 1, found.stdout


@pytest.mark.slow
def test_types_are_installed(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "pyprune" / "py.typed").is_file()
    assert (tmp_path / "pyprune" / "ops" / "__init__.pyi").read_text() == STUB.read_text()
