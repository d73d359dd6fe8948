"""Residual allocation: how many units each layer loses, from the error that their loss leaves in the residual stream.

One calibration pass of the dense model gives, for both output projections of every layer, the error of removing the n
least important units after refitting the rest, relative to the energy of the residual stream right after the sublayer.
Units are then removed globally along the lower convex hulls of these curves, the flattest slopes first, until the
budget is met.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from .budget import RemovedCounts, check_ratio, total_cost
from .rounding import rounded_counts, worth_by_errors

ErrorCurves = dict[str, Tensor]  # sublayer -> [units] float64: entry n is the error after n removals; entry 0 is 0


# An FFN's curve ends at this multiple of the ratio: eliminating all of 28672 channels takes longer than the layer's
# forward.
CUT_RATIOS = 2


def deepest_cut(ratio: float) -> int:
    """Tenths of an FFN that are taken to go at most under a budget of `ratio`: there its curve ends."""
    return min(10, math.ceil(10 * CUT_RATIOS * ratio - 1e-9))


@dataclass(frozen=True)
class Segment:
    """An edge of a curve's lower convex hull: `units` units of one sublayer, at `slope` error for a unit of cost."""

    slope: float
    layer: int
    sublayer: str
    units: int


def hull_segments(errors: Tensor, unit_cost: float, layer: int, sublayer: str) -> list[Segment]:
    """The lower convex hull of the points (n * unit_cost, errors[n]), edge by edge; slopes increase."""
    values = errors.tolist()
    hull: list[int] = []
    for n in range(len(values)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (n - a) < (values[n] - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(n)
    return [Segment((values[b] - values[a]) / ((b - a) * unit_cost), layer, sublayer, b - a) for a, b in pairwise(hull)]


def residual_counts(
    curves: list[ErrorCurves], shapes: list[LayerShape], ratio: float, multiple: int = 1
) -> RemovedCounts:
    """Units that each layer loses, so that their cost is within half a channel below to half above the budget.

    A segment that no longer fits is taken in part, in whole units; what is then left goes to the segments after it.
    `multiple`: of the channels that a layer keeps; the cost is then met within half of it, and the curves say where.
    """
    check_ratio(shapes, ratio, multiple)
    ends = [{ATTENTION: s.removable(ATTENTION), FFN: s.removable(FFN) - multiple + 1} for s in shapes]
    segments = sorted(
        (
            segment
            for layer, (own, shape) in enumerate(zip(curves, shapes, strict=True))
            for sublayer in SUBLAYERS
            if shape.removable(sublayer)
            for segment in hull_segments(
                own[sublayer][: ends[layer][sublayer]], shape.unit_cost(sublayer), layer, sublayer
            )
        ),
        key=lambda segment: segment.slope,
    )
    counts = [dict.fromkeys(SUBLAYERS, 0) for _ in shapes]
    rest = ratio * total_cost(shapes)
    # Edges of one curve come in the order of their slopes, so each begins where the one before it was taken whole;
    # once one was cut short, later edges of that curve are only continued, never jumped to.
    for segment in segments:
        cost = shapes[segment.layer].unit_cost(segment.sublayer)
        # Whole KV groups are never taken beyond the budget: channels fill what one leaves, to the nearest.
        fits = rest / cost if segment.sublayer == ATTENTION else rest / cost + 0.5
        take = min(segment.units, max(0, int(fits)))
        counts[segment.layer][segment.sublayer] += take
        rest -= take * cost
    return rounded_counts(counts, shapes, ratio, multiple, worth_by_errors([own[FFN] for own in curves], shapes))


def error_curve(removal_errors: Tensor, tokens: int, energy: float) -> Tensor:
    """[units] float64 on the CPU from errors at removal [units - 1]: mean over tokens, relative to `energy`.

    `energy` is the mean over tokens of the squared norm of the residual stream right after the sublayer.
    """
    errors = torch.cat([removal_errors.new_zeros(1), removal_errors]).double().cpu()
    return torch.cumsum(errors, 0) / (tokens * energy)
