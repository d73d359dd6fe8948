"""Every script of examples/ runs as it is, on less text, in a folder of its own.

One has a Python of its own, as a user's; the others are run in processes that have the libraries loaded.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked import run_script
from support.paths import ROOT

import pyprune

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PRINTED = {  # what the last line begins with
    "prune_and_evaluate": "PyPruneLlamaForCausalLM, ",
    "choose_a_method": "obs: about ",
    "export_gguf": "smaller.gguf: ",
    "hessian_of_any_model": "model.layers.",
    "gptq_with_our_kernels": "gptq: error ",
}
SLOW = set(PRINTED) - {"gptq_with_our_kernels"}
FRESH = "hessian_of_any_model"  # imports most


def test_all_are_known() -> None:
    assert {script.stem for script in EXAMPLES} == set(PRINTED)


@pytest.mark.parametrize(
    "script",
    [pytest.param(e, marks=pytest.mark.slow if e.stem in SLOW else ()) for e in EXAMPLES if e.stem != FRESH],
    ids=lambda script: script.stem,
)
def test_example(script: Path, tmp_path: Path) -> None:
    if script.stem == "export_gguf" and importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    ended = run_script(tmp_path, script, first=on_little_text)
    assert ended.status == 0, ended.err.read_text()
    assert_printed(script, ended.out.read_text())


def on_little_text() -> None:
    """What takes longest is text sampled from the model."""
    for function, sizes in (("prune", {"samples": 8}), ("evaluate", {"max_windows": 4})):
        whole = getattr(pyprune, function)
        setattr(
            pyprune,
            function,
            lambda *a, whole=whole, sizes=sizes, **k: whole(*a, **k | {"sequence_length": 32} | sizes),
        )


@pytest.mark.slow
def test_example_in_a_python_of_its_own(tmp_path: Path) -> None:
    script, environment = ROOT / "examples" / f"{FRESH}.py", os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert_printed(script, shown.stdout)


def assert_printed(script: Path, out: str) -> None:
    assert out.splitlines()[-1].startswith(PRINTED[script.stem]), out


def test_gguf_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    ended = run_script(tmp_path, ROOT / "examples" / "export_gguf.py")
    assert ended.status == 1
    said = ended.err.read_text().splitlines()[-1]
    assert said == "this example needs the package gguf: pip install 'pyprune[gguf]'"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_short_with_a_docstring(script: Path) -> None:
    source = script.read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring
    code = [line for line in source.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 30
