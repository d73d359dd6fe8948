"""The sizes that the layers of a pruned model keep: alike or not, FFN channels in multiples or not."""

import torch
from torch import Tensor

from pyprune.allocation.budget import RemovedCounts, total_cost
from pyprune.allocation.common_size import common_counts
from pyprune.allocation.rounding import check_multiple, rounded_counts
from pyprune.architectures import ATTENTION, FFN, LayerShape
from pyprune.errors import InputError

# Layouts of pruned models, and the one whose parameters are as many.
LAYOUTS = ("uniform", "uniform-rounded", "nonuniform", "nonuniform-rounded")
LEAST, MOST = 0.3, 1.0  # of a layer's units, what an allocation over layers leaves it
HALF_WIDTH = 0.35  # of the shares around their mean, before they are cut to LEAST and MOST


def layouts(dense: list[LayerShape], ratio: float, multiple: int, seed: int) -> dict[str, list[LayerShape]]:
    """The shapes of every layout of LAYOUTS, each without `ratio` of the decoder linears' parameters.

    multiple: of FFN channels in the rounded ones. InputError: a ratio or a multiple that is impossible.
    """
    check_multiple(dense, multiple)
    spread = spread_counts(dense, ratio, seed)
    counts = {
        "uniform": common_counts(dense, ratio),
        "uniform-rounded": common_counts(dense, ratio, multiple),
        "nonuniform": spread,
        "nonuniform-rounded": rounded_counts(spread, dense, ratio, multiple),
    }
    return {
        name: [
            shape.kept(shape.kv_groups - lost[ATTENTION], shape.intermediate_channels - lost[FFN])
            for shape, lost in zip(dense, own, strict=True)
        ]
        for name, own in counts.items()
    }


def spread_counts(dense: list[LayerShape], ratio: float, seed: int) -> RemovedCounts:
    """Units that each layer loses when the shares that are kept are drawn, LEAST to MOST, attention and FFN apart.

    The same seed gives the same shares. Channels make up for the rounding to whole KV groups, over the whole model.
    """
    offsets = HALF_WIDTH * (2 * torch.rand(2, len(dense), generator=torch.Generator().manual_seed(seed)) - 1)
    groups = torch.tensor([float(shape.kv_groups) for shape in dense])
    channels = torch.tensor([float(shape.intermediate_channels) for shape in dense])
    costs = torch.tensor([shape.group_cost for shape in dense])
    kept_groups = (shares(offsets[0], groups, (1 - ratio) * float(groups.sum())) * groups).round().clamp(min=1)
    budget = (1 - ratio) * total_cost(dense) - float((kept_groups * costs).sum())
    kept_channels = (shares(offsets[1], channels, budget) * channels).round()
    return [
        {ATTENTION: int(whole[0] - kept[0]), FFN: int(whole[1] - kept[1])}
        for whole, kept in zip(
            zip(groups, channels, strict=True), zip(kept_groups, kept_channels, strict=True), strict=True
        )
    ]


def shares(offsets: Tensor, sizes: Tensor, kept: float) -> Tensor:
    """One level plus the offsets [layers], cut to LEAST and MOST, such that the layers keep `kept` units of `sizes`."""
    if not LEAST * float(sizes.sum()) <= kept <= MOST * float(sizes.sum()):
        raise InputError(f"this ratio leaves {kept:.0f} of {float(sizes.sum()):.0f} units: outside {LEAST} to {MOST}")
    low, high = LEAST - HALF_WIDTH, MOST + HALF_WIDTH
    for _ in range(40):
        level = (low + high) / 2
        if float(((offsets + level).clamp(LEAST, MOST) * sizes).sum()) < kept:
            low = level
        else:
            high = level
    return (offsets + high).clamp(LEAST, MOST)
