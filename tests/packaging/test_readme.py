"""The README's commands and code run as they are written, in its order, on a part of the built-in text."""

import re
import shlex
import subprocess
from itertools import islice
from pathlib import Path

import pytest
from support.command_line import run
from support.forked import run_script
from support.paths import ROOT

from pyprune.calibration.sources import builtin
from pyprune.calibration.sources.documents import Documents

README = (ROOT / "README.md").read_text()


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


def beginning() -> Documents:
    return Documents(builtin.BUILTIN, islice(builtin.builtin_documents(), 48))


@pytest.mark.slow
def test_commands_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    # Whole it is tokenised for each command, which takes most of their time.
    monkeypatch.setattr("pyprune.calibration.sources.open.builtin_documents", beginning)
    (tmp_path / "models").symlink_to(ROOT / "models")
    typed = [words for words in commands() if words[0] == "pyprune"]
    assert [words[1] for words in typed] == ["estimate", "prune", "evaluate"]
    for words in typed:
        outcome = run(capsys, *words[1:])
        assert outcome.status == 0, f"{shlex.join(words)}: {outcome.err}"
    assert blocks("python")
    for number, code in enumerate(blocks("python")):
        script = tmp_path / f"{number}.py"
        script.write_text(code)
        ended = run_script(tmp_path, script)
        assert ended.status == 0, ended.err.read_text()


def test_length() -> None:
    assert len(README.splitlines()) <= 130, "details belong into docs/"
