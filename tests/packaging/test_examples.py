"""Every script of examples/ runs as it is, in a folder of its own."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PRINTED = {  # what the last line begins with
    "prune_and_evaluate": "PyPruneLlamaForCausalLM, ",
    "choose_a_method": "obs: about ",
    "export_gguf": "smaller.gguf: ",
    "hessian_of_any_model": "model.layers.",
    "gptq_with_our_kernels": "gptq: error ",
}
SLOW = set(PRINTED) - {"gptq_with_our_kernels"}  # they import transformers or prune: up to a minute on two cores


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_all_are_known() -> None:
    assert {script.stem for script in EXAMPLES} == set(PRINTED)


@pytest.mark.parametrize(
    "script",
    [pytest.param(e, marks=pytest.mark.slow if e.stem in SLOW else ()) for e in EXAMPLES],
    ids=lambda script: script.stem,
)
def test_example(script: Path, tmp_path: Path) -> None:
    if script.stem == "export_gguf" and importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    shown = run_python(tmp_path, str(script))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1].startswith(PRINTED[script.stem]), shown.stdout


def test_gguf_says_what_is_missing(tmp_path: Path) -> None:
    code = f"""
import importlib.util, runpy
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "gguf" else find(name, package)
runpy.run_path({str(ROOT / "examples" / "export_gguf.py")!r})
"""
    shown = run_python(tmp_path, "-c", code)
    assert shown.returncode == 1
    assert shown.stderr.splitlines()[-1] == "this example needs the package gguf: pip install 'pyprune[gguf]'"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_short_with_a_docstring(script: Path) -> None:
    source = script.read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring
    code = [line for line in source.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 30
