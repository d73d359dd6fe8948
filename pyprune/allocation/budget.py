"""Allocation of a ratio: the number, or the choice, of KV groups and FFN channels that every layer keeps.

Costs are in FFN channels (3 * hidden_size parameters): 1 for a channel, head_dim * (2r + 2) / 3 for a KV group.
At least one KV group and `least` FFN channels stay in every layer. Sublayers that a shape fixes lose nothing and count
nowhere.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..errors import InputError

RemovedCounts = list[dict[str, int]]  # by layer: sublayer -> units removed
Kept = dict[str, Tensor]  # sublayer -> sorted indices of the units that stay, int64
UnitScores = dict[str, Tensor]  # sublayer -> [units] float64, higher is more important


@dataclass(frozen=True)
class KeptUnits:
    """Kept units of every layer; `threshold` is the score that separates kept from removed, where one does."""

    layers: list[Kept]
    threshold: float | None = None


def total_cost(shapes: list[LayerShape]) -> float:
    return sum(s.cost for s in shapes)


def most_removable(shapes: list[LayerShape], least: int = 1) -> float:
    """The largest ratio that leaves one KV group and `least` FFN channels in every layer."""
    return 1 - sum(s.least_cost(least) for s in shapes) / total_cost(shapes)


def check_ratio(shapes: list[LayerShape], ratio: float, least: int = 1) -> None:
    """Raise InputError unless the ratio lies in (0, 1) and what has to stay in every layer can stay."""
    if not 0 < ratio < 1:
        raise InputError(f"ratio {ratio:g} is outside (0, 1): it is the share of decoder parameters to remove")
    most = most_removable(shapes, least)
    if ratio > most:
        channels = "one FFN channel" if least == 1 else f"{least} FFN channels"
        raise InputError(
            f"ratio {ratio:g} is impossible: one KV group and {channels} stay in every layer, "
            f"so at most {most:.4f} can be removed from this model"
        )


def uniform_counts(
    shapes: list[LayerShape], ratio: float, attention_ratio: float | None = None, least: int = 1
) -> RemovedCounts:
    """Units removed in every layer when all layers lose the same share.

    `attention_ratio` sets the attention's own ratio (the "manual" structures of FLAP).
    """
    check_ratio(shapes, ratio, least)
    if attention_ratio is None:
        return [layer_counts(shape, ratio, least) for shape in shapes]
    check_attention_ratio(attention_ratio)
    counts = []
    for shape in shapes:
        groups, channels = _split(shape, ratio, attention_ratio)
        if not 0 <= channels <= max(0, shape.removable(FFN) - least):
            raise InputError(
                f"attention ratio {attention_ratio:g} with ratio {ratio:g} would remove {channels} of "
                f"{shape.intermediate_channels} FFN channels; bring the two closer together"
            )
        counts.append({ATTENTION: groups, FFN: channels})
    return counts


def check_attention_ratio(attention_ratio: float) -> None:
    if not 0 <= attention_ratio < 1:
        raise InputError(f"attention ratio {attention_ratio:g} is outside [0, 1)")


def layer_counts(shape: LayerShape, ratio: float, least: int = 1) -> dict[str, int]:
    """Units that one layer loses: int(ratio * groups) KV groups, and FFN channels for the rest of its budget.

    With few KV groups int() falls far short (3 of 12 heads at 0.3 is 0.25), so that methods would be compared at
    different sizes; the stream error is taken from the FFN of the same layer, rounded to the nearest channel.
    """
    groups, channels = _split(shape, ratio, ratio)
    most = max(0, shape.removable(FFN) - least)
    if channels > most and shape.removable(ATTENTION):
        # The FFN alone cannot make up for the whole groups that int() left: take one more of them each time.
        missing = channels - most
        groups = min(groups + math.ceil(missing / shape.group_cost), shape.kv_groups - 1)
        channels = round(ratio * shape.cost - groups * shape.group_cost)
    if not 0 <= channels <= most:
        raise InputError(
            f"ratio {ratio:g} of one layer is impossible: one of {shape.kv_groups} KV groups and "
            f"{shape.intermediate_channels} FFN channels is too small or too large for it"
        )
    return {ATTENTION: groups, FFN: channels}


def _split(shape: LayerShape, ratio: float, attention_ratio: float) -> tuple[int, int]:
    """KV groups and FFN channels; without FFN channels that may go, the KV groups nearest to the budget."""
    if not shape.removable(FFN):
        most = max(0, shape.removable(ATTENTION) - 1)
        return min(round(ratio * shape.cost / shape.group_cost), most) if most else 0, 0
    groups = max(0, min(int(attention_ratio * shape.kv_groups + 1e-9), shape.removable(ATTENTION) - 1))
    return groups, round(ratio * shape.cost - groups * shape.group_cost)


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Sorted indices of all but the `removed` lowest scores [units]; of equal scores the first is removed first."""
    order = torch.sort(scores, stable=True).indices
    return order[removed:].sort().values


def choose_by_counts(scores: list[UnitScores], counts: RemovedCounts) -> KeptUnits:
    return KeptUnits(
        [{m: keep_highest(own[m], count[m]) for m in SUBLAYERS} for own, count in zip(scores, counts, strict=True)]
    )


def counts_of(choice: KeptUnits, shapes: list[LayerShape]) -> RemovedCounts:
    """Units that each layer loses by a choice."""
    return [
        {m: shape.units(m) - len(kept[m]) for m in SUBLAYERS} for kept, shape in zip(choice.layers, shapes, strict=True)
    ]


def choose_globally(
    scores: list[UnitScores],
    shapes: list[LayerShape],
    budget: float,
    modules: tuple[str, ...] = SUBLAYERS,
    least: int = 1,
) -> KeptUnits:
    """Remove the lowest units of the whole model until their cost is as near to `budget` as one unit allows.

    The best KV group and the `least` best channels of a layer are out of reach. Sublayers not named keep all their
    units.
    """
    entries = _Units(scores, shapes, modules, least)
    order = torch.sort(entries.score, stable=True).indices
    order = order[~entries.protected[order]]
    spent = torch.cumsum(entries.cost[order], 0)
    # `spent` grows, so the nearest sum is at one side of where the budget falls.
    count = int(torch.searchsorted(spent, budget))
    if count < len(spent) and spent[count] - budget < budget - (spent[count - 1] if count else 0.0):
        count += 1
    removed = torch.zeros(len(entries.score), dtype=torch.bool)
    removed[order[:count]] = True
    threshold = float(entries.score[order[count]]) if count < len(order) else None
    return KeptUnits(entries.kept(~removed), threshold)


def choose_above(scores: list[UnitScores], shapes: list[LayerShape], threshold: float, least: int = 1) -> KeptUnits:
    """Keep what scores strictly above the threshold, and the best KV group and `least` channels of a layer."""
    entries = _Units(scores, shapes, SUBLAYERS, least)
    return KeptUnits(entries.kept((entries.score > threshold) | entries.protected), threshold)


class _Units:
    """Rank every unit of the named sublayers in one row: score, cost, and whether it stays."""

    def __init__(
        self, scores: list[UnitScores], shapes: list[LayerShape], modules: tuple[str, ...], least: int
    ) -> None:
        self.scores, self.modules = scores, modules
        rows, costs, protected = [], [], []
        for own, shape in zip(scores, shapes, strict=True):
            for sublayer in modules:
                rows.append(own[sublayer])
                costs.append(torch.full((len(own[sublayer]),), shape.unit_cost(sublayer), dtype=torch.float64))
                best = torch.zeros(len(own[sublayer]), dtype=torch.bool)
                order = torch.sort(own[sublayer], descending=True, stable=True).indices
                best[order[: least if sublayer == FFN else 1]] = True
                if not shape.removable(sublayer):
                    best[:] = True
                protected.append(best)
        self.score, self.cost = torch.cat(rows), torch.cat(costs)
        self.protected = torch.cat(protected)

    def kept(self, mask: Tensor) -> list[Kept]:
        layers, start = [], 0
        for own in self.scores:
            kept = {}
            for sublayer in SUBLAYERS:
                if sublayer in self.modules:
                    stop = start + len(own[sublayer])
                    kept[sublayer] = mask[start:stop].nonzero().flatten()
                    start = stop
                else:
                    kept[sublayer] = torch.arange(len(own[sublayer]))
            layers.append(kept)
        return layers
