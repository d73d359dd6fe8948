"""The pages' plots, as SVG: quality by method, and seconds and memory of whole prunings beside published figures."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

Published = dict[str, Any]
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "pyprune", "font.size": 9}  # small files, the same ones each time
OUTSIDE = "outside the passes"
ROW_INCHES = 0.32


# Methods of the quality plot with their colours, told apart without red against green; markers differ too.
METHOD_STYLES = {
    "magnitude": ("0.55", "v"),
    "wanda-sp": ("#e69f00", "s"),
    "flap": ("#56b4e9", "D"),
    "slimgpt": ("#cc79a7", "^"),
    "obs": ("#0072b2", "o"),
}
PERPLEXITY_TICKS = (80, 100, 150, 200, 300)
PERPLEXITY_LIMITS = (72, 420)  # figures above are written: an axis up to them would hide the others


def plot_quality(rows: list[dict[str, Any]], file: Path) -> None:
    """Perplexity by ratio, one line a method and one panel a model; means over seeds, on a logarithmic axis."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        found.setdefault((row["model"], row["variant"], row["ratio"]), []).append(row["perplexity"])
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 3.6))
        panels = figure.subplots(1, len(models), sharey=True)
        for axes, model in zip(panels, models, strict=True):
            dense = mean(found[model, "dense", 0.0])
            for method, (colour, marker) in METHOD_STYLES.items():
                points = sorted((r, mean(own)) for (m, v, r), own in found.items() if (m, v) == (model, method))
                ratios = [0, *(100 * ratio for ratio, _ in points)]
                values = [dense, *(value for _, value in points)]
                axes.plot(ratios, values, color=colour, marker=marker, markersize=4, linewidth=1.6, label=method)
                if values[-1] > (top := PERPLEXITY_LIMITS[1]):
                    above = "\n".join(f"{v:.0f} at {r:g} %" for r, v in zip(ratios, values, strict=True) if v > top)
                    where = {"x": 50, "y": 400, "ha": "right", "va": "top", "fontsize": 7, "color": colour}
                    axes.text(s=f"{method}:\n{above}", **where)
            axes.axhline(dense, color="0.3", linestyle=":", linewidth=1, label="dense")
            axes.set(title=model, xlabel="parameters of the decoder linears removed, %", xticks=[0, 20, 30, 50])
            axes.set_yscale("log")
            axes.set_yticks(PERPLEXITY_TICKS, [str(tick) for tick in PERPLEXITY_TICKS])
            axes.minorticks_off()
            axes.set_ylim(*PERPLEXITY_LIMITS)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.92", linewidth=0.6)
        panels[0].set_ylabel("WikiText-2 perplexity")
        panels[0].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.93))
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)


def stage_seconds(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of a run by part: every stage of every pass, the rest of the pass, and what no pass counts."""
    parts: dict[str, float] = {}
    for name, own in run["passes"].items():
        stages = {stage: seconds for stage, seconds in own.get("stages", {}).items() if seconds > 0}
        parts |= {f"{name}: {stage}": seconds for stage, seconds in stages.items()}
        rest = own["seconds"] - sum(stages.values())
        if rest > 0:
            parts[f"{name}: other" if stages else name] = rest
    parts[OUTSIDE] = max(0.0, run["seconds"] - run["compute_seconds"])
    return parts


def plot_seconds(runs: dict[str, dict[str, Any]], published: list[Published], file: Path) -> None:
    """One bar a run, stacked by stage; published figures in grey, a range hatched."""
    by_run = {label: stage_seconds(run) for label, run in runs.items()}
    parts = [*dict.fromkeys(part for own in by_run.values() for part in own if part != OUTSIDE), OUTSIDE]
    colours = mpl.colormaps["tab20"].colors

    def draw(axes: Any) -> None:
        left = dict.fromkeys(by_run, 0.0)
        for number, part in enumerate(parts):
            widths = [own.get(part, 0.0) for own in by_run.values()]
            colour = "0.25" if part == OUTSIDE else colours[number % len(colours)]
            axes.barh(list(by_run), widths, left=list(left.values()), color=colour, label=part)
            left = {label: start + width for (label, start), width in zip(left.items(), widths, strict=True)}
        for label, total in left.items():
            axes.text(total, label, f" {total:.0f}", va="center", fontsize=8)
        for figure in published:
            low, high = figure["seconds"]
            axes.barh(figure["what"], low, color="0.75")
            axes.barh(figure["what"], high - low, left=low, color="0.9", hatch="///", edgecolor="0.75")
            axes.text(high, figure["what"], f" {high}", va="center", fontsize=8)
        axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.2 * 8 / (len(runs) + 8)))

    _figure("seconds", len(by_run) + len(published), draw, file)


def plot_memory(runs: dict[str, dict[str, Any]], published: list[Published], file: Path) -> None:
    """Peak memory of the device by run (of the host where there is no device), beside published figures."""

    def draw(axes: Any) -> None:
        axes.barh(list(runs), [peak_bytes(run) / 1e9 for run in runs.values()], color="tab:blue")
        for figure in published:
            if figure["gigabytes"] is not None:
                axes.barh(figure["what"], figure["gigabytes"], color="0.75")

    _figure("peak memory, GB", len(runs) + len(published), draw, file)


def peak_bytes(run: dict[str, Any]) -> int:
    """What PyTorch held of the device at most; on a CPU the process's resident peak."""
    return run["peak_memory"].get("device_reserved_bytes", run["peak_memory"]["host_bytes"])


def _figure(label: str, rows: int, draw: Callable[[Any], None], file: Path) -> None:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 1.2 + ROW_INCHES * rows))
        axes = figure.subplots()
        draw(axes)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
