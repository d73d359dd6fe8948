"""Rooflines (Williams, Waterman & Patterson 2009) of the operators, each an SVG element as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ..report.plots import ATTENTION, FFN, INK, PRUNE, STYLE, svg_of
from .case import OTHER, OURS, PYTORCH
from .rates import Rates
from .results import Row, candidates, fastest, median

BACKEND_COLORS = {"cuda": ATTENTION, "triton": FFN}
# ((label, colour, marker), kinds of which the fastest is drawn)
BASELINES = (
    (("fastest plain PyTorch", PRUNE, "D"), (PYTORCH, OTHER)),
    (("another tool's way", INK, "x"), (OTHER,)),
)


def roofline(rows: Sequence[Row], rates: Rates, name: str) -> str:
    """FLOP/s against FLOP a byte of the least work, both logarithmic, under what the device can do.

    `name` is unlike those of other plots on the page. Rows without arithmetic are left out; "" where ours is
    in none that is left.
    """
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in (row for row in rows if row["flops"]):
        drawn: list[tuple[tuple[str, str, str], dict[str, Any] | None]] = [
            ((one["name"], BACKEND_COLORS.get(one["name"], ATTENTION), "o"), one) for one in candidates(row, OURS)
        ]
        drawn += [(style, fastest(row, *kinds)) for style, kinds in BASELINES]
        for style, one in drawn:
            if one is not None:
                points.setdefault(style, []).append((row["flops"] / row["bytes"], row["flops"] / median(one) * 1e6))
    if not any(candidates(row, OURS) for row in rows if row["flops"]):
        return ""
    intensities = [x for own in points.values() for x, _ in own]
    # Two decades at least, so that each axis has labelled powers of ten.
    low, high = min(intensities) / 10, max(intensities) * 10
    products = {row["products"] for row in rows}
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(5.2, 3.2))
        axes = figure.add_axes((0.13, 0.15, 0.84, 0.66))
        x = np.geomspace(low, high, 200)
        for product in sorted(products):
            roof = rates.product_rate(product)
            axes.plot(x, np.minimum(x * rates.copy, roof), color=INK, linewidth=1.2)
            at = max(low * 1.2, min(roof / rates.copy, high / 3))
            flat = at * rates.copy >= roof
            text = f"{product} products" if flat else "copy"
            offset, side = ((2, 4), "left") if flat else ((-4, 5), "right")
            point = (at, min(at * rates.copy, roof))
            axes.annotate(text, point, offset, textcoords="offset points", fontsize=8, ha=side)
        for (label, color, marker), own in points.items():
            across, up = zip(*own, strict=True)
            look: dict[str, Any] = {"color": color} if marker == "x" else {"edgecolor": color}
            if marker == "D":
                look["facecolor"] = "none"
            elif marker == "o":
                look["facecolor"] = color
            axes.scatter(across, up, s=30, marker=marker, label=label, zorder=3, **look)
        reached = [y for own in points.values() for _, y in own]
        top = 2 * min(high * rates.copy, max(rates.product_rate(product) for product in products))
        axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="FLOP/s")
        axes.set(xlim=(low, high), ylim=(min(min(reached) / 2, top / 100), top))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.01), ncols=2, borderaxespad=0, handlelength=1, fontsize=8
        )
        return svg_of(figure, f"roofline {name}")
