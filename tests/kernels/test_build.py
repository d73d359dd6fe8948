"""The compiled core's sources: what they include, and what nvcc makes of the kernels."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
KERNEL_FILES = sorted((CSRC / "cuda").glob("*.cu"))

COMPILE_SECONDS = 120  # about 3 s alone on one core: room for a loaded machine, none for a PyTorch header
REGISTER_FILE = 65536  # 32-bit registers of one multiprocessor, sm_80 and sm_90
# Threads that must fit on a multiprocessor: of chunk_moments all that read at once, of merge_chunks one block; of
# accumulate_hessian one block, whose 11 warps take as many registers of the four schedulers as 12 would.
RESIDENT_THREADS = {
    "chunk_moments": 384,
    "merge_chunks": 1024,
    "accumulate_hessian": 384,
    "eliminate_panel": 512,
    "unit_errors": 544,
}


def includes(source: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source.read_text(), re.MULTILINE)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_headers(source: Path) -> None:
    names = includes(source)
    assert names or source.name == "isa.h"
    assert not [n for n in names if re.match(r"(torch|ATen|c10)/", n)]
    python = [n for n in names if re.match(r"(pybind11/|Python\.h)", n)]
    assert not python or source.parent == CSRC / "bindings"
    if source.parent != CSRC / "cuda":
        assert not [n for n in names if n.startswith("cuda")]


@pytest.fixture(scope="session")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if path is None:
        pytest.skip("there is no nvcc on this machine")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", KERNEL_FILES, ids=lambda p: p.name)
def test_kernels_fit_without_spills(source: Path, architecture: str, nvcc: str, tmp_path: Path) -> None:
    command = [nvcc, "-cubin", "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{CSRC / 'include'}", str(source)]
    command += [
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-o",
        str(tmp_path / "kernel.cubin"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    assert "Performance Loss" not in result.stderr, result.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        result.stderr,
        re.DOTALL,
    )
    found = set()
    for mangled, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{mangled} spills"
        name = next(n for n in RESIDENT_THREADS if n in mangled)
        assert int(registers) * RESIDENT_THREADS[name] <= REGISTER_FILE, f"{mangled}: {registers} registers"
        found.add(name)
    assert found == {name for name in RESIDENT_THREADS if name in source.read_text()}
