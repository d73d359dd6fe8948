"""docs/versions.md agrees with pyproject.toml, with the packages that are installed, and with the tested releases."""

import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.paths import ROOT

from pyprune.integrations import SUPPORTED

PAGE = (ROOT / "docs" / "versions.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWEST = {
    requirement.name: next(iter(requirement.specifier)).version
    for requirement in map(Requirement, PROJECT["dependencies"])
}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    torch, transformers, triton, other = ROWS["pyprune, oldest"]
    assert (torch, transformers, triton) == (LOWEST["torch"], LOWEST["transformers"], LOWEST["triton"])
    python = PROJECT["requires-python"].removeprefix(">=")
    assert other == f"huggingface_hub {LOWEST['huggingface_hub']}, Python {python}"


def test_the_versions_of_the_tests() -> None:
    torch, transformers, triton, other = ROWS["pyprune, tests on CPUs"]
    (made,) = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pinned = {Requirement(text).name: Requirement(text) for text in PROJECT["optional-dependencies"]["test"]}
    assert made.startswith(f"{torch}.")
    assert str(pinned["triton"].specifier).startswith(f"=={triton}.")
    assert transformers == f"{LOWEST['transformers']} or later"
    assert other == f"lm-eval {str(pinned['lm-eval'].specifier).removeprefix('==')}"


@pytest.mark.parametrize("tool", SUPPORTED)
def test_tested_releases_are_named(tool: str) -> None:
    for release in SUPPORTED[tool].tested:
        assert release in PAGE.rpartition("Tested:")[2]
    (row,) = (row for row in ROWS if row.lower().startswith(tool))
    assert row.split()[-1] == SUPPORTED[tool].tested[-1]


@pytest.mark.parametrize(
    ("row", "distribution"),
    [("llm-compressor 0.14.0.1", "llmcompressor"), ("GPTQModel 7.7.0", "gptqmodel"), ("vLLM 0.33", "vllm")],
)
def test_a_tool_asks_for_what_its_row_says(row: str, distribution: str) -> None:
    """Each bound in the row is inside the range that the installed release asks for, and the next one is not."""
    try:
        required = [Requirement(text) for text in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    if metadata.version(distribution) != row.split()[-1]:
        pytest.skip(f"{distribution} {metadata.version(distribution)} is installed, not {row}")
    asked = {requirement.name: requirement.specifier for requirement in required if requirement.marker is None}
    for name, cell in zip(("torch", "transformers"), ROWS[row], strict=False):
        for version in re.findall(r"\d[\d.]*", cell):
            excluded = cell.startswith("before")
            assert asked[name].contains(Version(version)) != excluded, (name, cell, str(asked[name]))
