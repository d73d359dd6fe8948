"""The sources are formatted and lint-free, and their imports run down. Their types are test_types.py's."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.mark.parametrize("command", [("ruff", "format", "--check"), ("ruff", "check")], ids=["format", "lint"])
def test_sources(command: tuple[str, ...]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# From the top floor down: a room imports from its own floor's other rooms never, from lower ones as it likes.
FLOORS = (
    *(
        "cli",
        "testing",
        "benchmark",
        "api",
        "pipeline",
        "passes",
        "publishing",
        "report",
        "job",
        "estimation",
        "exporters",
    ),
    *("methods", "evaluation", "mask_training", "calibration", "forward", "checkpoint", "integrations", "modeling"),
    *("ops", "allocation", "architectures", "runtime", "errors"),
)


def imported_rooms(file: Path) -> Iterator[tuple[str, str]]:
    """(room, statement) of every import of a file, wherever in it it stands."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            path = [*package[: len(package) - node.level + 1]] if node.level else []
            path += node.module.split(".") if node.module else []
            names = [path[1]] if len(path) > 1 else [alias.name for alias in node.names]
            yield from ((name, ast.unparse(node)) for name in names if path[:1] == ["pyprune"])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head, _, rest = alias.name.partition(".")
                if head == "pyprune" and rest:
                    yield rest.split(".")[0], ast.unparse(node)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_run_down_the_floors(room: str) -> None:
    folder = ROOT / "pyprune" / room
    for file in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        for name, statement in imported_rooms(file):
            if name in FLOORS:
                assert FLOORS.index(name) >= FLOORS.index(room), f"{file}: {statement}"
            else:
                assert name in ("triton_kernels", "_core", "__version__"), f"{file}: {statement}"


def test_every_room_has_a_floor() -> None:
    package = ROOT / "pyprune"
    rooms = {folder.name for folder in package.iterdir() if any(folder.glob("*.py"))}
    assert rooms <= set(FLOORS)
    assert {file.stem for file in package.glob("*.py")} == {"__init__", "__main__", "api", "errors"}
