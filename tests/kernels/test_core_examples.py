"""The compiled core without PyTorch, as csrc/examples use it: from C++, from the CUDA runtime, on NumPy's arrays."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

EXAMPLES = ROOT / "csrc" / "examples"
NUMPY_ARRAYS = EXAMPLES / "numpy_arrays.py"

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="no device of compute capability 9.0",
    ),
]


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name} on this machine")
    return path


def make(target: str, folder: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    command = [program("make"), "-C", str(EXAMPLES), f"OUT={folder}", *variables, target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hessian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, compiled and linked for compute capability 9.0; no device is needed."""
    home = os.environ.get("CUDA_HOME")
    nvcc = program(f"{home}/bin/nvcc" if home else "nvcc")
    folder = tmp_path_factory.mktemp("hessian")
    flags = "-std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -Werror all-warnings"
    made = make(f"{folder}/hessian", folder, f"NVCC={nvcc}", f"NVCCFLAGS={flags}")
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "hessian"


@pytest.mark.slow
def test_moments_from_cpp(tmp_path: Path) -> None:
    compiler = program(os.environ.get("CXX") or "g++")
    flags = "-std=c++20 -O2 -pthread -Wall -Wextra -Werror"
    made = make("run-moments", tmp_path, f"CXX={compiler}", f"CXXFLAGS={flags}")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "moments and errors of units are those of float64\n" in made.stdout
    for isa in ("portable", "avx2", "avx512"):
        run = subprocess.run([tmp_path / "moments"], env=os.environ | {"PYPRUNE_CPU_ISA": isa}, capture_output=True)
        assert run.returncode == 0 or b"cannot run on this processor" in run.stderr


@pytest.mark.slow
def test_hessian_is_compiled_and_linked(hessian: Path) -> None:
    """What it reports where there is no output projection is CUDA's own text."""
    assert os.access(hessian, os.X_OK)
    if not torch.cuda.is_available():
        run = subprocess.run([hessian], capture_output=True, text=True)
        assert run.returncode == 1
        assert "CUDA" in run.stderr


class TestOnHopper:
    pytestmark = on_hopper

    def test_hessian(self, hessian: Path) -> None:
        run = subprocess.run([hessian], capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "the Hessian's columns are those of float64\n"), run.stderr

    @pytest.mark.parametrize("memory", ["--cuda", "--cupy"])
    def test_arrays_on_a_gpu(self, memory: str) -> None:
        if memory == "--cupy" and importlib.util.find_spec("cupy") is None:
            pytest.skip("CuPy is not installed")
        assert run_arrays(memory) == "as in float64\n"


def run_arrays(*arguments: str) -> str:
    pytest.importorskip("pyprune._core", reason="pyprune was installed without its compiled core")
    run = subprocess.run([sys.executable, NUMPY_ARRAYS, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_numpy_arrays() -> None:
    """PyTorch cannot be imported here: an import of it, or the script's own check, would end the program."""
    pytest.importorskip("pyprune._core", reason="pyprune was installed without its compiled core")
    program = f"""
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError(f"{{name}} is imported")
sys.meta_path.insert(0, Refused())
sys.argv = [{str(NUMPY_ARRAYS)!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "as in float64\n"), run.stderr


def test_what_the_core_imports() -> None:
    """Nothing: no PyTorch, no NumPy, no pyprune."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("example", {str(NUMPY_ARRAYS)!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
before = set(sys.modules)
core = example.load_core()
assert core.build_info()["cpu_isa"]
print(sorted(set(sys.modules) - before), "torch" in sys.modules, "pyprune" in sys.modules)
"""
    pytest.importorskip("pyprune._core", reason="pyprune was installed without its compiled core")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[] False False\n", run.stderr + run.stdout


def test_a_wrong_result_is_noticed() -> None:
    """The check of the NumPy example refuses moments that are off by a thousandth."""
    import numpy as np

    spec = importlib.util.spec_from_file_location("numpy_arrays", NUMPY_ARRAYS)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    x = np.random.default_rng(0).normal(3, 1, (500, 20)).astype(np.float32)
    mean, m2 = x.astype(float).mean(0), x.astype(float).var(0) * 500
    example.check_moments(x, mean, m2)
    for wrong in ((mean * 1.001, m2), (mean, m2 * 0.999)):
        with pytest.raises(AssertionError):
            example.check_moments(x, *wrong)
