"""The wheel of `make wheel`: what lies in it, and a pruning with it far from the sources.

PYPRUNE_WHEEL_TORCH names a PyTorch to install from the package index, for example `torch==2.11.0`: the wheel then also
runs in an empty environment with that release and with the newest ones of the other dependencies. Unset, nothing is
downloaded, and the wheel runs with the libraries of the environment that runs the tests.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from email.message import Message
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = os.environ.get("PYPRUNE_WHEEL_TORCH")
# Those that setup.py looks for: without one the wheel has no core.
COMPILERS = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)]
# Imports of the sources, and the variables of a make that runs the tests, would reach the commands below.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYPRUNE_BUILD_CUDA")
}


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=cwd, env=ENVIRONMENT | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the source archive, built once with the installed tools and no network."""
    for requirement in PROJECT["optional-dependencies"]["wheel"]:
        tool = requirement.split(">=")[0]
        if not list(distributions(name=tool)):
            pytest.skip(f"{tool} is not installed: pip install '{requirement}'")
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    base = tmp_path_factory.getbasetemp()
    # Two workers of pytest-xdist would write into one build folder.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # -o: the environment of the tests has what `make wheel` would install into one of its own.
            tools = (f"WHEEL_VENV={sys.prefix}", "BUILD_OPTIONS=--no-isolation")
            run("make", "-o", f"{sys.prefix}/installed", "wheel", f"DIST={folder}", *tools)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def metadata(archive: ZipFile, name: str = "METADATA") -> Message:
    (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
    return Parser().parsestr(archive.read(path).decode())


def assert_prunes(python: Path, folder: Path) -> None:
    """The command line of this environment prunes the built-in model, from a folder without the sources."""
    folder.mkdir()
    run(
        python.with_name("pyprune"), "prune", ROOT / "models" / "llama-6m-gqa", "smaller",
        "--method", "flap", "--ratio", "0.3",
        "--calibration", "self", "--samples", "4", "--sequence-length", "32",
        cwd=folder, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert list((folder / "smaller").glob("*.safetensors"))
    assert (folder / "smaller" / "plan.json").is_file()


def new_environment(folder: Path) -> Path:
    """An empty environment's Python."""
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: object) -> None:
    """The tests' own pip installs into another environment: a pip of its own would take seconds to unpack."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments)


@pytest.mark.slow
def test_names_in_the_wheel(dist: Path) -> None:
    with ZipFile(only(dist, "*.whl")) as archive:
        names = set(archive.namelist())
        meta, tags = metadata(archive), metadata(archive, "WHEEL").get_all("Tag", [])
        notices = archive.read(f"pyprune-{PROJECT['version']}.dist-info/licenses/THIRD_PARTY_NOTICES").decode()
        stub = archive.read("pyprune/ops/__init__.pyi")
    assert stub == (ROOT / "pyprune" / "ops" / "__init__.pyi").read_bytes()
    files = {name for name in names if not name.endswith("/")}
    info = f"pyprune-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in files} == {"pyprune", info}, "no csrc, no tests, no triton_kernels on top"
    sources = {f"pyprune/{p.relative_to(ROOT / 'pyprune').as_posix()}" for p in (ROOT / "pyprune").rglob("*.py")}
    kernels = {f"pyprune/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources | kernels
    pages = (path for path in (ROOT / "pyprune").glob("*/templates/*") if path.is_file())
    assert {path.relative_to(ROOT).as_posix() for path in pages} <= files
    assert {"pyprune/report/templates/report.html", "pyprune/publishing/templates/README.md"} <= files
    assert {"pyprune/py.typed", "pyprune/ops/__init__.pyi", f"{info}/licenses/LICENSE"} <= files
    assert {f"pyprune/calibration/sources/builtin.{end}" for end in ("jsonl.xz", "md")} <= files

    cores = [name for name in files if re.fullmatch(r"pyprune/_core\.\S+\.so", name)]
    assert len(cores) == bool(COMPILERS)
    (pybind11,) = distributions(name="pybind11")
    licence = pybind11.read_text("licenses/LICENSE")
    assert licence is not None
    # The licence demands its text beside the binary; what follows it is about contributions to pybind11.
    assert licence.partition("Please also refer")[0].strip() in notices
    if cores:
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        assert tags
        assert all(re.fullmatch(rf"{python}-{python}-manylinux_2_\d+_\w+", tag) for tag in tags), tags

    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Version"] == PROJECT["version"]
    assert [value for value in meta.get_all("Requires-Dist", []) if value.startswith("torch>=")]


@pytest.mark.slow
def test_wheel_prunes_with_the_libraries_here(dist: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv")
    pip(python, "--no-deps", "--no-index", "--no-compile", only(dist, "*.whl"))
    # Behind the environment's own packages; the editable pyprune of the tests is a .pth file there, which Python does
    # not read in a folder that another .pth file names.
    packages = only(tmp_path, "venv/lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    # Found and loaded without an import of pyprune, which takes seconds.
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('pyprune').origin)", cwd=tmp_path)
    assert found == f"{packages / 'pyprune' / '__init__.py'}\n"
    if COMPILERS:
        cuda = run(python, "-c", "import _core; print(_core.build_info()['cuda'])", cwd=packages / "pyprune")
        assert cuda == "True\n" or shutil.which("nvcc") is None
    assert_prunes(python, tmp_path / "elsewhere")


@pytest.mark.slow
@pytest.mark.skipif(not TORCH, reason="PYPRUNE_WHEEL_TORCH is not set")
def test_wheel_prunes_with_another_torch(dist: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv")
    pip(python, str(TORCH), only(dist, "*.whl"))
    assert_prunes(python, tmp_path / "elsewhere")


@pytest.mark.slow
def test_without_compilers(dist: Path, tmp_path: Path) -> None:
    """The source archive alone gives a wheel for every Python where there is no compiler."""
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    source = only(tmp_path, "pyprune-*")
    inside = {name.removeprefix(f"{source.name}/") for name in names}
    assert {"LICENSE", "THIRD_PARTY_NOTICES", "setup.py", "csrc/bindings/module.cpp", "pyprune/py.typed"} <= inside
    assert {f"pyprune/calibration/sources/builtin.{end}" for end in ("jsonl.xz", "md")} <= inside
    assert not [name for name in inside if name.startswith(("tests", "models")) or name.endswith((".so", ".pyc"))]

    # As an earlier build leaves it behind, after which a module was removed or renamed.
    removed = source / "build" / "lib" / "pyprune" / "removed.py"
    removed.parent.mkdir(parents=True)
    removed.touch()
    (tmp_path / "nothing").mkdir()
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
        "--wheel-dir", tmp_path, source,
        cwd=tmp_path, PYPRUNE_BUILD_CUDA="0", PATH=str(tmp_path / "nothing"), CXX="",
    )  # fmt: skip
    wheel = only(tmp_path, "*.whl")
    assert wheel.name == f"pyprune-{PROJECT['version']}-py3-none-any.whl"
    with ZipFile(wheel) as archive:
        assert metadata(archive, "WHEEL")["Root-Is-Purelib"] == "true"
        assert not [name for name in archive.namelist() if "pyprune/_core" in name or name.endswith("removed.py")]


def test_requirements_of_the_build() -> None:
    """An isolated build takes seconds because it does not install PyTorch."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.split(r"\W", requirement)[0] for requirement in build} == {"setuptools", "pybind11", "ninja"}


def test_ruff_has_one_version() -> None:
    (pinned,) = [r for r in PROJECT["optional-dependencies"]["test"] if r.startswith("ruff==")]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{pinned.removeprefix('ruff==')}\n" in hooks
