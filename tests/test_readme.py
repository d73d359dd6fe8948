"""The README's commands run as they are written, in its order, and its figures are those of the committed results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SEMI_STRUCTURED = ("wanda", "sparsegpt", "dass")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line]


def test_make_targets() -> None:
    made = [words[1] for words in commands() if words[0] == "make"]
    assert made == ["demo", "test"]
    dry = subprocess.run(["make", "-n", "demo", "VENV=somewhere"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pyprune prune models/llama-6m-gqa" in dry.stdout
    assert subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, check=True).returncode == 0


@pytest.mark.figures
@pytest.mark.slow
def test_commands_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    typed = [words for words in commands() if words[0] == "pyprune"]
    assert {words[1] for words in typed} == {"prune", "evaluate", "export", "plan", "methods", "backends", "benchmark"}
    for words in typed:
        outcome = run(capsys, *words[1:])
        assert outcome.status == 0, f"{shlex.join(words)}: {outcome.err}"
    for code in blocks("python"):
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr


@pytest.mark.slow
def test_benchmarks_explain_themselves() -> None:
    named = {words[1] for words in commands() if words[0] == "python"}
    assert named
    for script in named:
        shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def perplexities() -> dict[str, list[float]]:
    """Figures of the README's tables of two models with three figures each, by the row's name."""
    return {
        cells[0]: [float(x) for cell in cells[1:] for x in cell.split(" / ")]
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in README.splitlines() if " / " in line)
        if len(cells) == 3 and re.fullmatch(r"[\d. /]+", cells[1])
    }


def test_perplexities_with_zeros_are_the_committed_run() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "quality-semi-structured.json").read_text())["rows"]
    for method in SEMI_STRUCTURED:
        expected = [
            mean([r["perplexity"] for r in rows if (r["model"], r["variant"]) == (model, f"{method} {pattern}")])
            for model in ("llama-24m-mha", "llama-23m-gqa")
            for pattern in ("2:4", "4:8", "unstructured")
        ]
        assert perplexities()[method] == [float(f"{x:.1f}") for x in expected]


def test_quality_table_is_the_committed_run() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())["rows"]
    table = {name: figures for name, figures in perplexities().items() if name not in SEMI_STRUCTURED}
    assert {"magnitude", "wanda-sp", "flap", "slimgpt", "obs"} <= set(table)
    for variant, figures in table.items():
        expected = [
            mean([r["perplexity"] for r in rows if (r["model"], r["variant"], r["ratio"]) == (model, variant, ratio)])
            for model in ("llama-24m-mha", "llama-23m-gqa")
            for ratio in (0.2, 0.3, 0.5)
        ]
        assert figures == [float(f"{x:.1f}") for x in expected]
        assert all(abs(r["ratio_met"] - r["ratio"]) <= 0.005 for r in rows if r["variant"] == variant)
