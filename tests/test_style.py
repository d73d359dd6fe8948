"""The sources are formatted, lint-free and typed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [("ruff", "format", "--check"), ("ruff", "check"), pytest.param(("mypy",), marks=pytest.mark.slow)],
    ids=["format", "lint", "types"],
)
def test_sources(command: tuple[str, ...]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_go_one_way() -> None:
    """Imports go one way: cli, pipeline, methods, ops, kernels."""
    below = {
        "ops": ("methods", "architectures", "checkpoint", "pipeline", "modeling", "forward"),
        "methods": ("checkpoint", "pipeline", "modeling", "forward", "cli"),
        "architectures": ("methods", "pipeline", "checkpoint", "modeling", "ops"),
    }
    for package, forbidden in below.items():
        for file in (ROOT / "pyprune" / package).glob("*.py"):
            for line in file.read_text().splitlines():
                if line.startswith(("from", "import")):
                    imported = line.split()[1].lstrip(".").removeprefix("pyprune.").split(".")[0]
                    assert imported not in forbidden, f"{file}: {line}"
