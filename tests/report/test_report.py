"""The report: one page that holds itself together, says what the plan says, and draws it to scale."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pyprune import InputError
from pyprune.report import plots as report_plots
from pyprune.report.page import write_report

pytestmark = pytest.mark.figures
SVG = "{http://www.w3.org/2000/svg}"


def make_plan(
    layers: int = 6, groups: int = 4, heads_per_group: int = 2, channels: int = 50, **changes: Any
) -> dict[str, Any]:
    """A plan as plan.json holds it, of a model with these sizes."""
    generator = np.random.default_rng(layers)

    def kept(units: int) -> list[int]:
        return sorted(generator.choice(units, generator.integers(1, units + 1), replace=False).tolist())

    def run(seconds: float) -> dict[str, Any]:
        each = [{"seconds": seconds / layers, "peak_memory_bytes": 3 << 20} for _ in range(layers)]
        return {"seconds": seconds, "peak_memory_bytes": 5 << 20, "cached": False, "layers": each}

    plan = {
        "format": "pyprune-plan-3",
        "model": "models/llama",
        "method": "flap",
        "options": {"mode": "exact", "squared": False},
        "seed": 0,
        "calibration": {"text": "valid.txt", "samples": 128, "sequence_length": 512, "fingerprint": "ab12"},
        "ratio": {"asked": 0.3, "met": 0.29984, "of_model": 0.2215},
        "parameters": {"decoder_linears": [4_423_680, 3_097_284], "model": [6_524_160, 5_197_764]},
        "bytes": [13_048_320, 10_395_528],
        "dense": {
            "hidden_size": 256,
            "head_dim": 32,
            "heads_per_group": heads_per_group,
            "kv_groups": groups,
            "intermediate_channels": channels,
            "layers": layers,
        },
        "layers": [
            {
                "kv_groups": kept(groups),
                "intermediate_channels": kept(channels),
                "scores": {
                    "kv_groups": generator.normal(size=groups).tolist(),
                    "intermediate_channels": generator.standard_t(2, size=channels).tolist(),
                },
            }
            for _ in range(layers)
        ],
        "threshold": -0.25,
        "passes": {"calibration": run(12.34), "prune": run(1.5)},
        "peak_memory_bytes": 5 << 20,
        "warnings": [],
        "seconds": 150.4,
        "versions": {"pyprune": "0.1.0", "torch": "2.11.0"},
        "device": "cpu",
        "dtype": "bfloat16",
        "backends": {"channel_moments": "cpu"},
    }
    return plan | changes


def page_of(plan: dict[str, Any], folder: Path) -> str:
    write_report(plan, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees: the text of the page, without its style, in single spaces."""
    pieces: list[str] = []
    parser = HTMLParser()
    parser.handle_data = pieces.append  # type: ignore[method-assign]
    parser.feed(re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(" ".join(pieces).split())


def plots_of(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def bar_heights(plot: ElementTree.Element, color: str) -> list[float]:
    """Heights of the plot's filled rectangles of that colour (the last one is the legend's)."""
    heights = []
    for path in plot.iter(f"{SVG}path"):
        if f"fill: {color}" in path.get("style", ""):
            y = [float(pair[1]) for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]
            heights.append(max(y) - min(y))
    return heights[:-1]


def test_the_page_says_what_the_plan_says(tmp_path: Path) -> None:
    text = text_of(page_of(make_plan(), tmp_path))
    for expected in (
        "30.00% asked, 29.98% met, which is 22.15% of the whole model",
        "Parameters of the decoder's linears 4,423,680 3,097,284 -29.98%",
        "Parameters of the model 6,524,160 5,197,764 -20.33%",
        "Size of the weights 12.44 MiB 9.91 MiB -20.33%",
        "5.2M parameters, from 6.52M",
        "calibration 12.3 s 5.00 MiB prune 1.5 s 5.00 MiB in all 2 min 30 s 5.00 MiB",
        "pruned by flap (mode exact, squared false)",
        "Calibration windows 128 windows of 512 tokens Calibration fingerprint ab12",
        "Backend of channel_moments cpu Versions pyprune 0.1.0, torch 2.11.0",
        "KV groups (2 query heads each, 32 channels a head)",
    ):
        assert expected in text
    assert "perplexity" not in text.lower()


def test_what_may_be_absent_or_present(tmp_path: Path) -> None:
    scored = {"perplexity": 98.367, "windows": 20, "sequence_length": 1024, "seconds": 5.0}
    pruned = scored | {"perplexity": 120.5, "kl_divergence": 0.31415, "top1_agreement": 0.715}
    plan = make_plan(
        heads_per_group=1,
        calibration=None,
        evaluation={"text": "test.txt", "dense": scored, "pruned": pruned},
        threshold=None,
    )
    plan["ratio"]["note"] = "A layer kept its last unit."
    plan["passes"]["calibration"] |= {"cached": True, "layers": []}
    text = text_of(page_of(plan, tmp_path))
    for expected in (
        "120.50 perplexity, from 98.37",
        "Perplexity 98.367 120.500 +22.50%",
        "KL divergence from dense, nats a token 0.3141",
        "Same most likely token as dense 71.50%",
        "Evaluated on 20 windows of 1024 tokens of test.txt.",
        "A layer kept its last unit.",
        "calibration 12.3 s 5.00 MiB statistics from the cache",
        "Calibration none: the method needs no data",
        "Attention: heads (32 channels a head)",
    ):
        assert expected in text
    assert "threshold" not in text

    del plan["passes"]["calibration"]
    plan["passes"]["prune"]["layers"] = []
    page = page_of(plan, tmp_path)
    assert "calibration" not in text_of(page)
    assert len(plots_of(page)) == 4


@pytest.mark.parametrize("layers", [1, 6, 80])
def test_kept_units_are_drawn_to_scale(layers: int, tmp_path: Path) -> None:
    plan = make_plan(layers)
    attention, ffn, *_ = plots_of(page_of(plan, tmp_path))
    for plot, unit, dense, color in (
        (attention, "kv_groups", 4, report_plots.ATTENTION),
        (ffn, "intermediate_channels", 50, report_plots.FFN),
    ):
        whole, bars = bar_heights(plot, report_plots.DENSE), bar_heights(plot, color)
        assert len(whole) == len(bars) == layers
        for layer, bar, height in zip(plan["layers"], bars, whole, strict=True):
            assert bar / height == pytest.approx(len(layer[unit]) / dense, abs=1e-4)


def test_times_are_drawn_to_scale(tmp_path: Path) -> None:
    plan = make_plan()
    for number, layer in enumerate(plan["passes"]["calibration"]["layers"]):
        layer["seconds"] = 0.1 * (number + 1)
    *_, times, memory = plots_of(page_of(plan, tmp_path))
    survey = bar_heights(times, report_plots.ATTENTION)
    assert [height / survey[0] for height in survey] == pytest.approx([1, 2, 3, 4, 5, 6], rel=1e-4)
    prune = bar_heights(times, report_plots.PRUNE)
    assert [height / survey[0] for height in prune] == pytest.approx([0.25 / 0.1] * 6, rel=1e-4)
    assert "milliseconds" in ElementTree.tostring(times, encoding="unicode")
    assert "MiB" in ElementTree.tostring(memory, encoding="unicode")


def test_threshold_and_scores(tmp_path: Path) -> None:
    plan = make_plan()
    plan["layers"][2]["scores"]["kv_groups"] = [float("inf"), 1.0, float("nan"), 2.0]
    plan["layers"][3]["scores"]["kv_groups"] = []
    page = page_of(plan, tmp_path)
    assert text_of(page).count("threshold: -0.25") == 2
    # All scores of a unit absent, equal, positive over decades, or with far outliers: still a plot.
    for values in ([[]], [[0.0, 0.0]], [[1e-6, 1.0]], [[-1.0] * 50 + [1e6]]):
        assert ElementTree.fromstring(report_plots.scores(values, None, "head", "#000000")) is not None
    assert "10^{-6}" in report_plots.scores([[1e-6, 1.0]], None, "head", "#000000").replace("−", "-")


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    plan = make_plan(model=evil, method=evil, options={evil: evil}, device=evil, dtype=evil, backends={evil: evil})
    plan["versions"] = {evil: evil}
    plan["calibration"] |= {"text": evil, "fingerprint": evil}
    plan["ratio"]["note"] = evil
    scored = {"perplexity": 9.0, "windows": 2, "sequence_length": 8, "seconds": 1.0}
    plan["evaluation"] = {"text": evil, "dense": scored, "pruned": scored}
    page = page_of(plan, tmp_path)
    assert "<script" not in page
    escaped = "&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)&lt;/script&gt;"
    assert page.count(escaped) == page.count("alert(")
    rows = text_of(page)[text_of(page).index("Settings") :]
    for name in ("Method", f"Option {evil}", "Calibration text", "fingerprint", "Device", "Data type"):
        assert f"{name} {evil}" in rows
    assert f"Backend of {evil} {evil} Versions {evil} {evil}" in rows


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(make_plan(), tmp_path)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|<link|<script|<img|url\((?!#)", page)
    ids = Counter(re.findall(r'\bid="([^"]+)"', page))
    assert set(ids.values()) == {1}
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= ids.keys()


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    first = page_of(make_plan(), tmp_path)
    page_of(make_plan(layers=9), tmp_path)
    assert page_of(make_plan(), tmp_path) == first


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format is 'pyprune-plan-9': this version reads 'pyprune-plan-3'"):
        write_report(make_plan(format="pyprune-plan-9"), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
