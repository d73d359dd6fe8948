"""The benchmark's page: from JSON files alone, whole without a script and a network; history against noise."""

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_runs import benchmark, make_quick
from support.command_line import run

from pyprune.benchmark.page_history import changed
from pyprune.benchmark.results import device_name, read_document, row_line, share_of_floor, times_faster

HESSIAN = "hessian/llama-2-7b-down/32768x11008/bf16"
NORM = "rms_norm/llama-2-7b/16384x4096/bf16"
RATES = {"copy": 3e12, "bfloat16": 7e14, "float32": 5e13, "tf32": 4e14}


def candidate(name: str, kind: str, median: float | None, error: float = 1e-6, **changes: Any) -> dict[str, Any]:
    time = None
    if median is not None:
        time = {"median": median, "low": 0.99 * median, "high": 1.01 * median, "host": 9.0, "repeat": 30}
    own = {"name": name, "kind": kind, "source": "FLAP, arXiv 2312.11983" if kind == "other" else "", "reason": ""}
    own |= {"status": "timed" if time else "out of memory", "errors": {"H": error}, "peak_bytes": 1000}
    return own | {"microseconds": time} | changes


def row(id: str, *candidates: dict[str, Any], **changes: Any) -> dict[str, Any]:
    operator, where, size, _ = id.split("/")
    own = {"id": id, "operator": operator, "where": where, "size": size, "dtype": "bfloat16", "date": "2026"}
    work = {
        "bytes": 10**9,
        "flops": 10**12,
        "products": "bfloat16",
        "floor_microseconds": 1428.0,
        "bound": "arithmetic",
    }
    outcome = {"allowed": {"H": 2e-6}, "reason": "", "faults": [], "candidates": list(candidates)}
    return own | work | outcome | changes


def document(date: str, *rows: dict[str, Any], **machine: Any) -> dict[str, Any]:
    facts = {"date": f"{date}T10:00:00+00:00", "pyprune": "0.1.0", "commit": "abc1234", "cpu": "A CPU"}
    facts |= {"cpu_threads": 2, "gpu": "NVIDIA <Test> & Co"} | machine
    own = {"format": 2, "kind": "pyprune benchmark", "machine": facts, "device": "cuda", "tuned": None}
    return own | {"rates": RATES, "rows": list(rows)}


def usual(date: str, ours: float) -> dict[str, Any]:
    others = candidate("plain <b>", "pytorch", 2000.0), candidate("running update", "other", 20000.0)
    ran_out = candidate("large", "pytorch", None, reason="OutOfMemoryError: CUDA out of memory", errors=None)
    hessian = row(HESSIAN, candidate("cuda", "pyprune", ours), candidate("triton", "pyprune", 999.0), *others, ran_out)
    return document(date, hessian, row(NORM, candidate("triton", "pyprune", 50.0), *others[:1]))


class Page(HTMLParser):
    """Every element is closed in its place; collects attributes and texts."""

    VOID = ("meta", "input", "path", "use", "rect", "line", "br")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.source = file.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, own, value in self.attributes if own == name]


def page_of(capsys: pytest.CaptureFixture[str], folder: Path, *documents: dict[str, Any]) -> Page:
    files = [folder / f"{number}.json" for number in range(len(documents))]
    for file, own in zip(files, documents, strict=True):
        file.write_text(json.dumps(own))
    outcome = run(capsys, "benchmark", "--page", *files, "--output", folder / "page.html")
    assert (outcome.status, outcome.out) == (0, f"{folder / 'page.html'}\n"), outcome.err
    return Page(folder / "page.html")


def test_page_is_whole_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, tmp_path, usual("2026-01-01", 1000.0))
    # Nothing is fetched: no address but SVG's name space, and links that lead to a place in the page.
    assert set(re.findall(r"https?://[^\s\"'<]+", page.source)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert page.values("src") == []
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert len(links) == 2
    assert all(link[0] == "#" and link[1:] in ids for link in links)
    assert page.source == page_of(capsys, tmp_path, usual("2026-01-01", 1000.0)).source


def test_small_sizes_make_no_headline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU gets a small model and few operators: no mean over them. Where none of ours was timed, no roofline."""
    whole = usual("2026-01-01", 1000.0)
    assert "geometric mean" in " ".join(page_of(capsys, tmp_path, whole).texts)
    cpu = page_of(capsys, tmp_path, whole | {"device": "cpu"})
    assert "geometric mean" not in " ".join(cpu.texts)
    assert "Rooflines" in cpu.texts
    untimed = document("2026-01-01", row(HESSIAN, candidate("plain", "pytorch", 2000.0)))
    page = page_of(capsys, tmp_path, untimed)
    assert "Rooflines" not in page.texts
    assert "<svg" not in page.source


def test_what_a_row_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(capsys, tmp_path, usual("2026-01-01", 1000.0))
    text = " ".join(page.texts)
    for shown in ("1 ms", "2.00 ×", "20.00 ×", "143%", "1.0e-06", "2.0e-06", "NVIDIA <Test> & Co", "plain <b>"):
        assert shown in text, shown
    for source in ("FLAP, arXiv 2312.11983", "out of memory", "OutOfMemoryError: CUDA out of memory", "700 TFLOP/s"):
        assert source in text, source
    assert f"pyprune benchmark --device cuda --row {HESSIAN}" in text
    assert "History" not in text
    # Sorted by numbers, not by their text.
    assert {"1000.0", "50.0"} <= set(page.values("data-value"))
    assert {value for tag, name, value in page.attributes if (tag, name) == ("figure", "data-operator")} == {
        "hessian",
        "rms_norm",
    }
    assert page.source.count("<svg") == 2


def test_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files come in any order; a row is compared on one device only."""
    elsewhere = document("2026-04-01", row(HESSIAN, candidate("cuda", "pyprune", 1.0)), gpu="NVIDIA Other")
    later, earlier = usual("2026-03-01", 800.0), usual("2026-02-01", 1000.0)
    page = page_of(capsys, tmp_path, later, elsewhere, earlier)
    text = " ".join(page.texts)
    assert text.count("History") == 1
    runs = text[text.index("History") :]
    assert runs.index("2026-02-01") < runs.index("2026-03-01")
    assert "-20.0%" in text
    assert "+0.0%, within noise" in text
    assert page.source.count("<h2>") == 2
    # The newest figures stand in the table, with the fastest PyTorch of their own run.
    assert "2.50 ×" in text
    assert "2.00 ×" not in text


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ((100, 98, 102), (90, 88, 92), ("-10.0%", "good")),
        ((100, 98, 102), (110, 103, 112), ("+10.0%", "bad")),
        ((100, 95, 105), (96, 94, 97), ("-4.0%, within noise", "")),
    ],
)
def test_changes_against_noise(first: tuple[float, ...], last: tuple[float, ...], expected: tuple[str, str]) -> None:
    before, after = (dict(zip(("median", "low", "high"), own, strict=True)) for own in (first, last))
    assert changed(before, after)[:2] == expected


def test_rows_that_were_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = candidate("cuda", "pyprune", None, 1.0, status="wrong", reason="error of H 1, allowed 2e-06")
    fault = "cuda: wrong: error of H 1, allowed 2e-06"
    rows = [
        row(HESSIAN, wrong, candidate("plain", "pytorch", 10.0), faults=[fault]),
        row(NORM, reason="the inputs do not fit: CUDA out of memory", allowed={}),
    ]
    page = page_of(capsys, tmp_path, document("2026-01-01", *rows))
    text = " ".join(page.texts)
    assert fault in text
    assert "not correct" in text
    assert "rows, 1 not correct" in text
    assert "the inputs do not fit: CUDA out of memory" in text
    assert row_line(rows[0]) == f"{HESSIAN}  NOT CORRECT, not timed: {fault}"
    assert times_faster(rows[0], "pytorch") is None
    assert share_of_floor(rows[1]) is None


def test_from_the_benchmark_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with its history; what the page says to type repeats the row."""
    make_quick(monkeypatch)
    id = "swiglu/tiny/1024x160/bf16"
    assert benchmark(capsys, "--row", id, "--output", tmp_path / "old" / "a.json").status == 0
    old = read_document(tmp_path / "old" / "a.json")
    old["machine"]["date"] = "2026-01-01T00:00:00+00:00"
    (tmp_path / "old" / "a.json").write_text(json.dumps(old))
    outcome = benchmark(capsys, "--row", id, "--output", tmp_path / "new.json", "--history", tmp_path / "old")
    assert outcome.status == 0, outcome.err
    page = Page(tmp_path / "new.html")
    assert "History" in " ".join(page.texts)
    assert device_name(old) in " ".join(page.texts)
    (typed,) = {text for text in page.texts if text.startswith("pyprune benchmark --device")}
    again = run(capsys, *shlex.split(typed)[1:], "--json")
    assert [one["id"] for one in again.json["rows"]] == [id]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a result of `pyprune benchmark`"),
        ('{"kind": "pyprune benchmark", "format": 9}', "its format is 9; this version reads 2"),
        ('{"kind": "pyprune benchmark", "format": 2, "rows": []}', "it lacks device, machine, rates"),
    ],
)
def test_files_that_are_no_results(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(content)
    outcome = run(capsys, "benchmark", "--page", tmp_path, "--output", tmp_path / "page.html")
    assert outcome.status == 2
    assert message in outcome.err
    assert not (tmp_path / "page.html").exists()
