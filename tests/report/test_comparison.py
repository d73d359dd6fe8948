"""Outputs side by side: their own figures, and never those of different texts without a word."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import make_plan, plots_of, text_of

from pyprune.cli.main import main
from pyprune.report.comparison import read_runs, summary_rows


def output(folder: Path, text: str = "A", digest: str = "1", **changes: Any) -> Path:
    """A folder with a plan, evaluated on windows of that fingerprint."""
    dense = {"perplexity": 20.0, "windows": 4, "sequence_length": 64, "perplexity_standard_error": 0.5}
    compared = {"perplexity": 25.0, "text_fingerprint": text, "kl_divergence": 0.25, "top1_agreement": 0.75}
    evaluation = {"text": "test.txt", "dense": dense, "pruned": dense | compared}
    plan = make_plan(evaluation=evaluation, source={"digests": {"a": digest}}, **changes)
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


@pytest.mark.figures
def test_a_table_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output(tmp_path / "one")
    output(tmp_path / "$two_<b>", layers=9)
    status, out, err = run(capsys, "compare", "one", "$two_<b>")
    assert (status, err) == (0, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert rows[1] == ["one", "flap", "0.2998", "10.4 MB", "25.000 ± 0.500", "0.2500", "2 min 30 s", "5.2 MB"]
    page = (tmp_path / "comparison.html").read_text()
    text = text_of(page)
    assert "Perplexity before 20.000 ± 0.500 20.000 ± 0.500" in text
    assert "A: 4 × 64 tokens of test.txt A: 4 × 64 tokens of test.txt" in text
    assert "Note:" not in text
    assert not re.search(r"<script|<b>|<link|<img|https?://(?!www\.w3\.org)", page.replace('<div class="tile"><b>', ""))
    drawn = ["".join(plot.itertext()) for plot in plots_of(page)]
    assert len(drawn) == 2
    assert all("$two_<b>" in words and "one" in words for words in drawn)

    again = run(capsys, "compare", "one", "$two_<b>")
    assert again[0] == 2
    assert again[2] == "pyprune: comparison.html: exists; name another output\n"
    status, out, _ = run(capsys, "compare", "one", "$two_<b>", "--json", "--page", "other.html")
    assert [own["output"] for own in json.loads(out)["outputs"]] == ["one", "$two_<b>"]
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()


def test_different_texts_and_models_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [
        output(tmp_path / "one"),
        output(tmp_path / "two", text="B"),
        output(tmp_path / "three", digest="2", model="models/other"),
        output(tmp_path / "four"),
    ]
    assert [row[4] for row in summary_rows(read_runs(folders))[1:]] == [
        "25.000 ± 0.500 (A)",
        "25.000 ± 0.500 (B)",
        "25.000 ± 0.500 (A)",
        "25.000 ± 0.500 (A)",
    ]
    status, _, err = run(capsys, "compare", *(folder.name for folder in folders))
    assert status == 0
    notes = err.splitlines()
    assert notes[0].startswith("note: 2 different base models (models/llama, models/other): ")
    assert notes[1].startswith(
        "note: perplexities of different texts or windows, not to be compared across letters: A: "
    )
    page = text_of((tmp_path / "comparison.html").read_text())
    assert "2 different base models" in page
    assert "B: 4 × 64 tokens of test.txt" in page


def test_windows_that_are_not_recorded_are_like_no_others(tmp_path: Path) -> None:
    folders = [output(tmp_path / "one"), output(tmp_path / "two")]
    for folder in folders:
        plan = json.loads((folder / "plan.json").read_text())
        del plan["evaluation"]["pruned"]["text_fingerprint"]
        (folder / "plan.json").write_text(json.dumps(plan))
    assert [run.text for run in read_runs(folders)] == ["A", "B"]


def test_what_is_no_output_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output(tmp_path / "one")
    (tmp_path / "two.partial").mkdir()
    output(tmp_path / "old", format="pyprune-plan-2")
    cases = {
        ("one",): "one: one output alone; name two or more",
        ("one", "./one"): "one: named twice",
        ("one", "nothing"): "nothing: no output of `pyprune prune` (it has no plan.json)",
        (
            "one",
            "two.partial",
        ): "two.partial: no output of `pyprune prune` (it has no plan.json); it is an unfinished run",
        ("one", "old"): "old: its plan has format 'pyprune-plan-2': this version reads 'pyprune-plan-3'",
    }
    for names, line in cases.items():
        assert run(capsys, "compare", *names) == (2, "", f"pyprune: {line}\n")
    assert not (tmp_path / "comparison.html").exists()
