"""The plots of a report, each an SVG element as text. Nothing in them comes from the user but numbers."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ATTENTION, FFN, PRUNE, DENSE, INK, WARNING = "#3565a8", "#1f8a70", "#c0682a", "#dde1e6", "#3c4450", "#b3261e"
_EDGE, _GRID, _CARD = "#9aa3ad", "#eef0f3", "#ffffff"
# The page's style sheet has other colours for a dark page under these names.
_VARIABLES = {
    ATTENTION: "attention",
    FFN: "ffn",
    PRUNE: "prune",
    DENSE: "dense",
    INK: "ink",
    WARNING: "warning",
    _EDGE: "edge",
    _GRID: "grid",
    _CARD: "card",
}
# Inches. Two plots stand side by side on a wide page; on a phone one is as wide as the page, and at 360 pixels its
# text of 10 points is 10 pixels high.
_WIDTH, _LEFT, _RIGHT, _BOTTOM, _TOP = 5.0, 0.68, 0.1, 0.46, 0.3
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: small, sharp, selectable
    "axes.edgecolor": _EDGE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "legend.frameon": False,
}
_REPORT_STYLE = STYLE | {"font.size": 10, "figure.facecolor": "none", "axes.facecolor": "none"}


def kept_units(kept: Sequence[int], dense: int, unit: str, color: str) -> str:
    """Bars: units that each layer keeps, in front of the `dense` number of units."""
    with matplotlib.rc_context(_REPORT_STYLE):
        figure, axes = _layer_axes(len(kept), height=2.3)
        layers = np.arange(len(kept))
        axes.bar(layers, [dense] * len(kept), width=0.8, color=DENSE, label=f"dense: {dense}")
        least, most = min(kept), max(kept)
        label = f"kept: {least}" if least == most else f"kept: {least} to {most}"
        axes.bar(layers, kept, width=0.8, color=color, label=label)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        _legend(axes)
        return _themed(figure, unit)


def scores(per_layer: Sequence[Sequence[float]], threshold: float | None, unit: str, color: str) -> str:
    """The distribution of the units' scores in each layer: range, quartiles and median, and the threshold."""
    finite = [np.asarray(values, dtype=float) for values in per_layer]
    finite = [values[np.isfinite(values)] for values in finite]
    with matplotlib.rc_context(_REPORT_STYLE):
        figure, axes = _layer_axes(len(per_layer), height=2.8)
        layers = np.array([layer for layer, values in enumerate(finite) if len(values)])
        if len(layers):
            quantiles = [np.quantile(values, (0, 0.25, 0.5, 0.75, 1)) for values in finite if len(values)]
            low, first, median, third, high = np.array(quantiles).T
            # Line widths follow the room that a layer has: 300 points of width are drawn on.
            room = 300 / len(per_layer)
            axes.vlines(layers, low, high, color=color, alpha=0.35, linewidth=min(1.5, room / 4), label="range")
            width = min(10, room * 0.6)
            axes.vlines(layers, first, third, color=color, linewidth=width, label="middle half")
            axes.plot(layers, median, "_", color=_CARD, markersize=width, markeredgewidth=1.5)
            _score_scale(axes, np.concatenate(finite))
        if threshold is not None:
            axes.axhline(threshold, color=WARNING, linewidth=1, linestyle="--", label=f"threshold: {threshold:.4g}")
        axes.set_ylabel(f"score of a {unit}")
        _legend(axes)
        return _themed(figure, "scores " + unit)


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


def error_curves(
    curves: Sequence[Mapping[str, Sequence[float]]], units: Sequence[int], cuts: Sequence[int], name: str
) -> str:
    """Lines: each layer's error by the share of its units removed, and a dot where it was cut.

    curves: by layer `removed` and `error`; units: that each had; cuts: that each lost.
    """
    with matplotlib.rc_context(_REPORT_STYLE | {"axes.grid.axis": "both"}):
        figure, axes = _axes(height=2.8)
        # The middle of the map, whose colours are seen on white and on black.
        colors = matplotlib.colormaps["viridis"](np.linspace(0.35, 0.8, len(curves)))
        dots = []
        for layer, (curve, count, lost) in enumerate(zip(curves, units, cuts, strict=True)):
            removed, error = np.asarray(curve["removed"][1:]), np.asarray(curve["error"][1:])
            label = f"layer {layer}" if layer in (0, len(curves) - 1) else None
            axes.plot(removed / count, error, color=colors[layer], linewidth=1.2, label=label)
            dots += [(n / count, e) for n, e in zip(removed, error, strict=True) if n == lost]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", color=PRUNE, markersize=4, label="cut")
        if all(min(curve["error"][1:], default=1) > 0 for curve in curves):
            axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the units removed")
        axes.set_ylabel("error")
        _legend(axes)
        return _themed(figure, name)


def per_pass(values: Mapping[str, Sequence[float]], unit: str) -> str:
    """Bars side by side: one value per layer for each pass."""
    colors = {"calibration": ATTENTION, "prune": PRUNE}
    with matplotlib.rc_context(_REPORT_STYLE):
        figure, axes = _layer_axes(max(len(heights) for heights in values.values()), height=2.3)
        width = 0.8 / len(values)
        for number, (name, heights) in enumerate(values.items()):
            layers = np.arange(len(heights)) + (number - (len(values) - 1) / 2) * width
            axes.bar(layers, heights, width=width, color=colors[name], label=name)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _legend(axes)
        return _themed(figure, unit)


def lines(by_name: Mapping[str, Sequence[float]], label: str, name: str, logarithmic: bool = False) -> str:
    """Lines over the layers, one for each name, which stand below the plot."""
    with matplotlib.rc_context(_REPORT_STYLE):
        rows = -(-len(by_name) // 3)
        figure, axes = _axes(height=2.7 + 0.2 * rows, below=0.1 + 0.2 * rows)
        _number_layers(axes, max(len(values) for values in by_name.values()))
        for one, values in by_name.items():
            axes.plot(range(len(values)), values, marker="o", markersize=3, linewidth=1.2, label=one)
        if logarithmic and min(min(values) for values in by_name.values()) > 0:
            axes.set_yscale("log")
        axes.set_ylabel(label)
        height = figure.get_figheight()
        figure.legend(loc="lower center", bbox_to_anchor=(0.5, 0.02 / height), ncols=3, handlelength=1.2)
        return _themed(figure, name)


def training(losses: Sequence[float], kept: Sequence[float]) -> str:
    """Lines over the steps: the loss, its average over the last twentieth of the steps, and the share kept."""
    with matplotlib.rc_context(_REPORT_STYLE):
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
        return _themed(figure, "training")


def _axes(height: float, below: float = 0.0) -> tuple[Figure, Axes]:
    """A figure `height` inches high, with room of `below` inches under the axis's label."""
    figure = Figure(figsize=(_WIDTH, height))
    width, room = _WIDTH - _LEFT - _RIGHT, height - _BOTTOM - below - _TOP
    axes = figure.add_axes((_LEFT / _WIDTH, (_BOTTOM + below) / height, width / _WIDTH, room / height))
    axes.tick_params(length=0)
    return figure, axes


def _layer_axes(layers: int, height: float) -> tuple[Figure, Axes]:
    figure, axes = _axes(height)
    _number_layers(axes, layers)
    return figure, axes


def _number_layers(axes: Axes, layers: int) -> None:
    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _legend(axes: Axes) -> None:
    """Above the axes, so that it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4, borderaxespad=0, handlelength=1.2, columnspacing=1.2
        )


def _themed(figure: Figure, name: str) -> str:
    """`svg_of` in the colours of the page's style sheet, which a dark page changes."""

    def variable(found: re.Match[str]) -> str:
        color = _VARIABLES.get(found[0])
        return found[0] if color is None else f"var(--{color})"

    return re.sub(r"#[0-9a-f]{6}\b", variable, svg_of(figure, name))


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
