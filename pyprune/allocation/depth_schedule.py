"""Ratios by depth from a formula: SlimGPT's incremental pruning ratio (arXiv 2412.18110, section 3.3)."""

import math

from ..architectures import LayerShape
from ..errors import InputError
from .budget import RemovedCounts, check_ratio, layer_counts

SCHEDULES = ("log", "linear", "uniform")


def incremental_counts(
    shapes: list[LayerShape], ratio: float, schedule: str, first: float | None, least: int = 1
) -> RemovedCounts:
    """Units that each layer loses: r_i = r_0 + (r_last - r_0) f(i), the same for KV groups and FFN channels.

    `schedule`: log f(i) = ln(i + 1) / ln(n); linear f(i) = i / (n - 1); uniform f(i) = 1. `first` is r_0 as a share
    of `ratio`; None takes 0, or as much as keeps the last layer possible. r_last is what makes the mean over the
    decoder linears `ratio`. `least` FFN channels stay in every layer. InputError if that is out of reach.
    """
    check_ratio(shapes, ratio, least)
    if first is not None and not 0 <= first <= 1:
        raise InputError(f"the first layer's share {first:g} is outside [0, 1]: it is a share of the ratio")
    layers = len(shapes)
    if schedule == "uniform" or layers == 1:
        return [layer_counts(shape, ratio, least) for shape in shapes]
    rise = [math.log(i + 1) / math.log(layers) if schedule == "log" else i / (layers - 1) for i in range(layers)]
    total = sum(shape.cost for shape in shapes)
    mean_rise = sum(f * shape.cost for f, shape in zip(rise, shapes, strict=True)) / total
    limits = [1 - shape.least_cost(least) / shape.cost for shape in shapes]
    start = first * ratio if first is not None else _smallest_start(ratio, mean_rise, limits[-1])
    ratios = [start + (ratio - start) / mean_rise * f for f in rise]
    for layer, (own, most) in enumerate(zip(ratios, limits, strict=True)):
        if own > most + 1e-9:
            raise InputError(
                f"ratio {ratio:g} with {schedule} ratios would remove {own:.4f} of layer {layer}, and {most:.4f} is "
                "the most it can lose; raise --first-share, or leave it out"
            )
    return [layer_counts(shape, own, least) for shape, own in zip(shapes, ratios, strict=True)]


def _smallest_start(ratio: float, mean_rise: float, most: float) -> float:
    """r_0 >= 0 with r_last = r_0 + (ratio - r_0) / mean_rise <= most; never above `ratio`."""
    excess = ratio / mean_rise - most
    return min(ratio, max(0.0, excess / (1 / mean_rise - 1)))
