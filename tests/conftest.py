"""Fixtures that several test files share."""

import importlib.util
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.texts import harvest

sys.path.insert(0, str(ROOT / "benchmarks"))
# The large libraries are imported where they are used: pytest-xdist's controller reads this file and runs no test.

# A fresh process after each of hundreds of prunings would take minutes; tests of just that say --verify.
os.environ["PYPRUNE_VERIFY"] = "0"


def lacks_gpu(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") is None:
        return False
    import torch

    return not torch.cuda.is_available()


def lacks_llama_cpp(item: pytest.Item) -> bool:
    return item.get_closest_marker("llama_cpp") is not None and importlib.util.find_spec("llama_cpp") is None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if lacks_gpu(item):
        pytest.skip("no CUDA device")
    if lacks_llama_cpp(item):
        pytest.skip("llama-cpp-python is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With PYPRUNE_REQUIRE_SHARED=1 a test that needs the shared models and texts is not skipped for want of them."""
    report = yield
    required = item.get_closest_marker("shared") is not None and os.environ.get("PYPRUNE_REQUIRE_SHARED") == "1"
    if report.skipped and required and not lacks_gpu(item) and not lacks_llama_cpp(item):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but PYPRUNE_REQUIRE_SHARED=1: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def blank_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's figures are drawn for the tests that say so (marker `figures`), not after each of hundreds of runs."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # kernels draw nothing; the import would take seconds
    if request.node.get_closest_marker("figures") is None and not interpreted:
        from support.figures import leave_blank

        leave_blank(monkeypatch.setattr)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Trained models and texts beside the repository; the test is skipped where they are absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained 6M-parameter Llama (6 layers, 8 heads, 4 KV heads) that comes with the repository."""
    return ROOT / "models" / "llama-6m-gqa"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hundred sentences to calibrate on: read it only."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(harvest())
    return file


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a random checkpoint: `tiny_checkpoint(family="qwen2", layers=4, ...) -> folder`.

    The arguments and their small default sizes are those of pyprune/testing/random_checkpoint.py. A folder is made
    once a session for each set of arguments: read it only, or copy it.
    """
    from pyprune.testing.random_checkpoint import make_checkpoint

    made: dict[str, Path] = {}

    def factory(**arguments: Any) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **arguments)
        return made[key]

    return factory
