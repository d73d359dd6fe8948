"""The report: one page that holds itself together, says what the plan says, and draws it to scale."""

import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from pyprune import InputError
from pyprune.architectures import LayerShape
from pyprune.calibration.mixture import parts_of, spelled_texts
from pyprune.calibration.source import described
from pyprune.cli.options import options_given
from pyprune.cli.prune import prune
from pyprune.methods import make_method
from pyprune.report import plots as report_plots
from pyprune.report.commands import prune_command
from pyprune.report.naming import hub_id, model_name
from pyprune.report.page import write_report

SVG = "{http://www.w3.org/2000/svg}"


def recorded(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """A method's options as plan.json has them, of a model of the sizes that `make_plan` takes by default."""
    return make_method(method, options).fitted([LayerShape(256, 32, 4, 2, 50)]).options


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
        "options": recorded("flap", {"mode": "reference", "square_attention": True}),
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


def drawn(samples: list[dict[str, str]]) -> dict[str, Any]:
    """Continuations as a plan's evaluation holds them."""
    return {"seed": 3, "temperature": 0.7, "prompt_tokens": 16, "new_tokens": 32, "samples": samples}


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
    """Heights of the plot's filled rectangles of the style sheet's colour (the last one is the legend's)."""
    heights = []
    for path in plot.iter(f"{SVG}path"):
        if f"fill: var(--{color})" in path.get("style", ""):
            y = [float(pair[1]) for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]
            heights.append(max(y) - min(y))
    return heights[:-1]


def test_the_page_says_what_the_plan_says(tmp_path: Path) -> None:
    text = text_of(page_of(make_plan(), tmp_path))
    for expected in (
        "30.00% asked, 29.98% met, which is 22.15% of the whole model",
        "Parameters of the decoder's linears 4,423,680 3,097,284 -29.98%",
        "Parameters of the model 6,524,160 5,197,764 -20.33%",
        "Size of the weights 13.0 MB 10.4 MB -20.33%",
        "5.2M parameters, from 6.52M",
        "calibration 12.3 s 5.2 MB prune 1.5 s 5.2 MB in all 2 min 30 s 5.2 MB",
        "pruned by flap (mode reference)",
        "Calibration windows 128 windows of 512 tokens Calibration fingerprint ab12",
        "Backend of channel_moments cpu Versions pyprune 0.1.0, torch 2.11.0",
        "KV groups (2 query heads each, 32 channels a head)",
    ):
        assert expected in text
    assert "perplexity" not in text.lower()


@pytest.mark.figures
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
        "calibration 12.3 s 5.2 MB statistics from the cache",
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


@pytest.mark.figures
@pytest.mark.parametrize("layers", [1, 6, 80])
def test_kept_units_are_drawn_to_scale(layers: int, tmp_path: Path) -> None:
    plan = make_plan(layers)
    attention, ffn, *_ = plots_of(page_of(plan, tmp_path))
    for plot, unit, dense, color in (
        (attention, "kv_groups", 4, "attention"),
        (ffn, "intermediate_channels", 50, "ffn"),
    ):
        whole, bars = bar_heights(plot, "dense"), bar_heights(plot, color)
        assert len(whole) == len(bars) == layers
        for layer, bar, height in zip(plan["layers"], bars, whole, strict=True):
            assert bar / height == pytest.approx(len(layer[unit]) / dense, abs=1e-4)


@pytest.mark.figures
def test_times_are_drawn_to_scale(tmp_path: Path) -> None:
    plan = make_plan()
    for number, layer in enumerate(plan["passes"]["calibration"]["layers"]):
        layer["seconds"] = 0.1 * (number + 1)
    *_, times, memory = plots_of(page_of(plan, tmp_path))
    survey = bar_heights(times, "attention")
    assert [height / survey[0] for height in survey] == pytest.approx([1, 2, 3, 4, 5, 6], rel=1e-4)
    prune = bar_heights(times, "prune")
    assert [height / survey[0] for height in prune] == pytest.approx([0.25 / 0.1] * 6, rel=1e-4)
    assert "milliseconds" in ElementTree.tostring(times, encoding="unicode")
    assert "MB" in ElementTree.tostring(memory, encoding="unicode")


@pytest.mark.figures
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
    plan["evaluation"]["continuations"] = drawn([{"prompt": evil, "dense": evil, "pruned": evil}])
    page = page_of(plan, tmp_path)
    assert "<script" not in page
    assert "alert('" not in page  # in command lines too, which quote it once more
    rows = text_of(page)[text_of(page).index("Settings") :]
    for name in ("Method", f"Option {evil}", "Calibration text", "fingerprint", "Device", "Data type"):
        assert f"{name} {evil}" in rows
    assert f"Backend of {evil} {evil} Versions {evil} {evil}" in rows


@pytest.mark.figures
def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = page_of(make_plan(), tmp_path)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|<link|<script|<img|url\((?!#)", page)
    ids = Counter(re.findall(r'\bid="([^"]+)"', page))
    assert set(ids.values()) == {1}
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= ids.keys()


@pytest.mark.slow
@pytest.mark.figures
def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    first = page_of(make_plan(), tmp_path)
    page_of(make_plan(layers=9), tmp_path)
    assert page_of(make_plan(), tmp_path) == first


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format is 'pyprune-plan-9': this version reads 'pyprune-plan-3'"):
        write_report(make_plan(format="pyprune-plan-9"), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_title_is_the_models_name() -> None:
    names = {
        "models/llama-6m-gqa": "llama-6m-gqa",
        "org/name": "name",
        "org/name-7B@v1.0/rc": "name-7B",
        "/home/x/models--org--name-7B/snapshots/c0ffee": "name-7B",
        "LlamaForCausalLM (in memory)": "LlamaForCausalLM (in memory)",
    }
    assert {model: model_name(model) for model in names} == names
    assert hub_id("/home/x/models--org--name-7B/snapshots/c0ffee") == "org/name-7B"
    assert hub_id("org/name@main") == "org/name"
    assert (hub_id("org/name"), hub_id("/a/b"), hub_id("models/../x")) == ("org/name", None, None)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flap", {}),
        ("flap", {"uniform": True, "structure": "UL-UM"}),
        ("flap", {"structure": "UL-MM", "attention_ratio": 0.25}),
        ("flap", {"mode": "reference", "square_attention": False}),
        ("obs", {"allocation": "log", "first_share": 0.5}),
        ("slimgpt", {"uniform": True}),
        ("sparsegpt", {"pattern": "2:4"}),
    ],
)
def test_the_command_gives_the_runs_options(method: str, options: dict[str, Any]) -> None:
    """What `pyprune prune` reads from it is what the plan holds, and options that change nothing are not in it."""
    plan = make_plan(method=method, options=recorded(method, options), seed=7)
    plan["identity"] = {"shard_size": 2_000_000_000}
    scored = {"perplexity": 9.0, "windows": 20, "sequence_length": 64}
    plan["evaluation"] = {"text": "my test.txt", "dense": scored, "pruned": scored}
    command = prune_command(plan, "out dir")
    assert command is not None
    words = shlex.split(command)
    context = prune.make_context("prune", words[2:])
    found = context.params
    assert (words[:2], found["model"], found["output"]) == (["pyprune", "prune"], "models/llama", Path("out dir"))
    assert recorded(method, options_given(found)) == plan["options"]
    assert len(options_given(found)) <= len(options)
    asked = ("ratio", "calibration", "samples", "sequence_length", "seed", "dtype", "text", "evaluation_length")
    assert [found[name] for name in asked] == [0.3, ("valid.txt",), 128, 512, 7, "bfloat16", "my test.txt", 64]
    assert (found["max_windows"], found["shard_size"]) == (20, 2_000_000_000)


def test_the_command_gives_the_runs_texts() -> None:
    """Several with their shares, and how they were read."""
    plan = make_plan()
    counts = {"a b.csv": 1, "org/set:plain": 1, "self": 1}
    sources = [{"text": text, "share": 1 / 3, "windows": n, "fingerprint": "f"} for text, n in counts.items()]
    plan["calibration"] |= {"sources": sources, "packing": "separate", "text_column": "body"}
    command = prune_command(plan, "OUTPUT")
    assert command is not None
    found = prune.make_context("prune", shlex.split(command)[2:]).params
    assert [(part.text, part.windows) for part in parts_of(spelled_texts(found["calibration"]), 3)] == [*counts.items()]
    assert (found["packing"], found["text_column"]) == ("separate", "body")
    for given in (["one", "two"], torch.zeros(2, 8)):
        sources[1]["text"] = described(given)
        assert prune_command(plan, "OUTPUT") is None


def test_a_text_given_in_python_has_no_command() -> None:
    assert prune_command(make_plan(model="LlamaForCausalLM (in memory)"), "OUTPUT") is None
    plan = make_plan()
    plan["calibration"]["text"] = described(["one", "two"])
    assert prune_command(plan, "OUTPUT") is None
    plan["calibration"]["text"] = described(torch.zeros(2, 8))
    assert prune_command(plan, "OUTPUT") is None


def test_continuations_and_self_judgement(tmp_path: Path) -> None:
    scored = {"perplexity": 9.0, "windows": 2, "sequence_length": 64}
    samples = [{"prompt": "It was", "dense": " a dark night", "pruned": " a dark <horse>"}]
    plan = make_plan(evaluation={"text": "self", "dense": scored, "pruned": scored, "continuations": drawn(samples)})
    text = text_of(page_of(plan, tmp_path))
    assert "It was before a dark night after a dark <horse>" in text
    assert "32 tokens after the first 16 of 1 windows of the evaluation text, sampled at temperature 0.7" in text
    assert "perplexity, from 9.00, self-judged" in text
    assert "Self-judged: the text was sampled from the dense model." in text
    plan["evaluation"]["text"] = "test.txt"
    assert "elf-judged" not in text_of(page_of(plan, tmp_path))


@pytest.mark.figures
def test_error_curves_are_drawn_with_their_cuts(tmp_path: Path) -> None:
    plan = make_plan(layers=2)
    curve = {"removed": [0, 10, 20, 30, 40, 49], "error": [0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]}
    groups = {"removed": [0, 1, 2, 3], "error": [0.0, 1e-3, 1e-2, 1e-1]}
    plan["error_curves"] = {"kv_groups": [groups] * 2, "intermediate_channels": [curve] * 2}
    for layer, lost in zip(plan["layers"], (20, 0), strict=True):
        layer["intermediate_channels"] = list(range(50 - lost))
    page = page_of(plan, tmp_path)
    assert "Error by units removed" in text_of(page)
    ffn = plots_of(page)[3]
    lines = [re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")) for path in ffn.iter(f"{SVG}path")]
    found = [[tuple(map(float, point)) for point in points] for points in lines if len(points) == 5]
    line = next(
        points
        for points in found
        if points == sorted(points, key=lambda point: point[0]) and points[0][1] > points[1][1]
    )
    assert np.diff([y for _, y in line]) == pytest.approx(line[1][1] - line[0][1], abs=0.01)  # a decade each
    dots = [use for use in ffn.iter(f"{SVG}use") if "fill: var(--prune)" in use.get("style", "")]
    cut, _ = [(float(dot.get("x", 0)), float(dot.get("y", 0))) for dot in dots]  # the last one is the legend's
    assert cut == pytest.approx(line[1], abs=0.01)
