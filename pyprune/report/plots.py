"""The plots of a report, each an SVG element as text. Nothing in them comes from the user but numbers."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ATTENTION, FFN, PRUNE, DENSE, INK, WARNING = "#3565a8", "#1f8a70", "#c0682a", "#e3e6ea", "#3c4450", "#b3261e"
_WIDTH = 10.0  # inches; the page scales the SVG to its own width
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: small, sharp, selectable
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#eef0f3",
    "legend.frameon": False,
}


def kept_units(kept: Sequence[int], dense: int, unit: str, color: str) -> str:
    """Bars: units that each layer keeps, in front of the `dense` number of units."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(len(kept), height=2.3)
        layers = np.arange(len(kept))
        axes.bar(layers, [dense] * len(kept), width=0.8, color=DENSE, label=f"dense: {dense}")
        least, most = min(kept), max(kept)
        label = f"kept: {least}" if least == most else f"kept: {least} to {most}"
        axes.bar(layers, kept, width=0.8, color=color, label=label)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _legend(axes)
        return svg_of(figure, unit)


def scores(per_layer: Sequence[Sequence[float]], threshold: float | None, unit: str, color: str) -> str:
    """The distribution of the units' scores in each layer: range, quartiles and median, and the threshold."""
    finite = [np.asarray(values, dtype=float) for values in per_layer]
    finite = [values[np.isfinite(values)] for values in finite]
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(len(per_layer), height=2.8)
        layers = np.array([layer for layer, values in enumerate(finite) if len(values)])
        if len(layers):
            quantiles = [np.quantile(values, (0, 0.25, 0.5, 0.75, 1)) for values in finite if len(values)]
            low, first, median, third, high = np.array(quantiles).T
            # Line widths follow the room that a layer has: 540 points of width are drawn on.
            room = 540 / len(per_layer)
            axes.vlines(layers, low, high, color=color, alpha=0.35, linewidth=min(1.5, room / 4), label="range")
            width = min(10, room * 0.6)
            axes.vlines(layers, first, third, color=color, linewidth=width, label="middle half")
            axes.plot(layers, median, "_", color="white", markersize=width, markeredgewidth=1.5)
            _score_scale(axes, np.concatenate(finite))
        if threshold is not None:
            axes.axhline(threshold, color=WARNING, linewidth=1, linestyle="--", label=f"threshold: {threshold:.4g}")
        axes.set_ylabel(f"score of a\n{unit}")
        _legend(axes)
        return svg_of(figure, "scores " + unit)


def _score_scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic where positive scores span decades; where z-scores have far outliers, linear for the
    nine tenths nearest to 0 and logarithmic beyond; else linear."""
    if values.min() > 0:
        if values.max() > 100 * values.min():
            axes.set_yscale("log")
        return
    most, largest = np.quantile(np.abs(values), (0.9, 1))
    if largest > 5 * most > 0:
        axes.set_yscale("symlog", linthresh=most)


def per_pass(values: Mapping[str, Sequence[float]], unit: str) -> str:
    """Bars side by side: one value per layer for each pass."""
    colors = {"calibration": ATTENTION, "prune": PRUNE}
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(max(len(heights) for heights in values.values()), height=2.3)
        width = 0.8 / len(values)
        for number, (name, heights) in enumerate(values.items()):
            layers = np.arange(len(heights)) + (number - (len(values) - 1) / 2) * width
            axes.bar(layers, heights, width=width, color=colors[name], label=name)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _legend(axes)
        return svg_of(figure, unit)


def losses(by_linear: Mapping[str, Sequence[float]]) -> str:
    """Lines over the layers, one a linear: shares of its output's energy, logarithmic."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(max(len(values) for values in by_linear.values()), height=2.8)
        for name, values in by_linear.items():
            axes.plot(range(len(values)), values, marker="o", markersize=3, linewidth=1.2, label=name)
        if min(min(values) for values in by_linear.values()) > 0:
            axes.set_yscale("log")
        axes.set_ylabel("share of the energy")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.2)
        axes.set_position((0.085, 0.42 / 2.8, 0.8, 1 - 0.72 / 2.8))
        return svg_of(figure, "losses")


def training(losses: Sequence[float], kept: Sequence[float]) -> str:
    """Lines over the steps: the loss, its average over the last twentieth of the steps, and the share kept."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _layer_axes(len(losses), height=2.6)
        steps, several = list(range(len(losses))), max(1, len(losses) // 20)
        sums = np.cumsum(np.insert(np.asarray(losses, dtype=float), 0, 0.0))
        average = [(sums[k + 1] - sums[max(0, k + 1 - several)]) / min(k + 1, several) for k in steps]
        axes.plot(steps, losses, color=ATTENTION, linewidth=0.5, alpha=0.4)
        axes.plot(steps, average, color=ATTENTION, linewidth=1.5, label="loss")
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        right = axes.twinx()
        right.plot(steps, kept, color=PRUNE, linewidth=1)
        right.set_ylim(0, 1.05)
        right.set_axis_off()
        axes.plot([], [], color=PRUNE, linewidth=1, label=f"kept (0 to 1): {kept[-1]:.3f} at the end")
        _legend(axes)
        return svg_of(figure, "training")


def _layer_axes(layers: int, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.085, 0.42 / height, 0.905, 1 - 0.72 / height))
    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Above the axes, so that it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4, borderaxespad=0, handlelength=1.2)


def svg_of(figure: Figure, name: str) -> str:
    """The figure as an <svg> element, the same text for the same figure.

    The ids come from the salt; with one salt a figure, elements of two figures on one page share no id.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"pyprune {name}", "svg.id": None}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names of matplotlib's parts, repeated in every figure
    svg = re.sub(r' width="[^"]*pt"', "", re.sub(r' height="[^"]*pt"', "", svg, count=1), count=1)
    return svg.strip()
