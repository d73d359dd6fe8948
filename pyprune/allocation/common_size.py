"""Layers of one size, as stock classes have them: the same number of KV groups and of FFN channels everywhere.

The budget leaves one choice: more KV groups and fewer channels, or the other way round.
"""

import math
from typing import NamedTuple

from ..architectures import ATTENTION, FFN, LayerShape
from ..errors import InputError
from .budget import RemovedCounts, check_attention_ratio, total_cost
from .residual import ErrorCurves
from .rounding import nearest


class LayerSize(NamedTuple):
    """Units that every layer keeps; `exact`: channels that meet the budget with these KV groups, before rounding."""

    kv_groups: int
    channels: int
    exact: float


def common_sizes(shapes: list[LayerShape], ratio: float, multiple: int) -> list[LayerSize]:
    """The sizes that all layers can have and that meet the ratio within half a multiple of channels a layer.

    They differ in their KV groups, fewer first. Raises InputError where there is none.
    """
    attending = [s for s in shapes if s.removable(ATTENTION)]
    if len({(s.heads_per_group, s.head_dim) for s in attending}) > 1:
        raise InputError("--uniform is impossible: the layers' KV groups are of several widths")
    budget = (1 - ratio) * total_cost(shapes)  # of what may go, in channels
    group_cost = sum(s.group_cost for s in attending)  # one KV group in each layer that has them
    groups = min((s.kv_groups for s in attending), default=0)
    channels = min(s.intermediate_channels for s in shapes)
    if any(s.intermediate_channels != channels for s in shapes):
        channels -= channels % multiple  # some layers are cut in any case
    cut = bool(shapes[0].removable(FFN))
    sizes = []
    taken = [s.group_counts for s in attending if s.group_counts is not None]
    for kept in range(min(1, groups), groups + 1):
        if any(kept not in counts for counts in taken):
            continue
        exact = (budget - kept * group_cost) / len(shapes)
        sizes.append(LayerSize(kept, nearest(exact, channels, multiple) if cut else 0, exact))
    # A multiple's half beyond the ends, and between them a whole layer's last step is never longer than a multiple.
    most = multiple / 2 if cut else group_cost / len(shapes) / 2
    fitting = [size for size in sizes if abs(size.channels - size.exact) <= most]
    if not cut:  # all channels stay, and the KV groups come as near as they can
        fitting = [
            size._replace(channels=channels, exact=channels)
            for size in sorted(fitting, key=lambda size: abs(size.exact))[:1]
        ]
    if not fitting:
        best = min(sizes, key=lambda size: abs(size.channels - size.exact))
        met = 1 - (best.kv_groups * group_cost + len(shapes) * best.channels) / total_cost(shapes)
        raise InputError(
            f"ratio {ratio:g} is impossible with --uniform: all layers can keep at most {groups} KV groups and "
            f"{channels} FFN channels; the nearest ratio possible is {met:.4f}"
        )
    return fitting


def common_counts(
    shapes: list[LayerShape], ratio: float, multiple: int = 1, attention_ratio: float | None = None
) -> RemovedCounts:
    """Units that each layer loses, so that all keep the same: KV groups lose `ratio` of their number, rounded down.

    FFN channels make up the rest, to the nearest multiple; where they cannot, more KV groups go, or fewer.
    `attention_ratio` sets the attention's own ratio, which then is kept to. Raises InputError for what is impossible.
    """
    sizes = common_sizes(shapes, ratio, multiple)
    of_groups = ratio if attention_ratio is None else attention_ratio
    check_attention_ratio(of_groups)
    groups = [s.kv_groups for s in shapes if s.removable(ATTENTION)]
    mean = sum(groups) / max(1, len(groups))
    kept = min(max(1, math.ceil((1 - of_groups) * mean - 1e-9)), min(groups, default=0))
    best = min(sizes, key=lambda size: abs(size.kv_groups - kept))
    if attention_ratio is not None and best.kv_groups != kept:
        raise InputError(
            f"attention ratio {attention_ratio:g} with ratio {ratio:g} leaves each layer {kept} KV groups and no "
            "possible number of FFN channels; bring the two closer together"
        )
    return counts_to(best, shapes)


def cheapest_counts(
    curves: list[ErrorCurves], shapes: list[LayerShape], ratio: float, multiple: int = 1
) -> RemovedCounts:
    """Units that each layer loses for one common size: the size with the smallest sum of errors over all layers.

    Errors are those of the channels that meet the budget exactly, so that of two sizes the one that rounding makes
    smaller is at no disadvantage. A size that some FFN's curve does not reach comes after all that are reached.
    """

    def error(size: LayerSize) -> tuple[int, float]:
        beyond, total = 0, 0.0
        for own, shape in zip(curves, shapes, strict=True):
            kept = min(max(round(size.exact), 1), shape.intermediate_channels)
            removed, end = shape.intermediate_channels - kept, len(own[FFN]) - 1
            beyond += max(0, removed - end)
            total += float(own[FFN][min(removed, end)])
            if shape.removable(ATTENTION):
                total += float(own[ATTENTION][shape.kv_groups - size.kv_groups])
        return beyond, total

    return counts_to(min(common_sizes(shapes, ratio, multiple), key=error), shapes)


def counts_to(size: LayerSize, shapes: list[LayerShape]) -> RemovedCounts:
    return [
        {
            ATTENTION: s.kv_groups - size.kv_groups if s.removable(ATTENTION) else 0,
            FFN: s.intermediate_channels - size.channels if s.removable(FFN) else 0,
        }
        for s in shapes
    ]
