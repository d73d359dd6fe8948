"""FFN channels in multiples: what each layer keeps is a multiple of N, or all of its channels.

Tiles of matrix products and blocks of quantised rows have such sizes. Layers go down to the multiple below, and then
up, where a channel is worth most, until the model is as large as its budget says.
"""

from collections.abc import Callable

from torch import Tensor

from ..architectures import ATTENTION, FFN, LayerShape
from ..errors import InputError
from .budget import RemovedCounts, UnitScores, total_cost

# (layer, fewer, more) -> what the layer's channels are worth that it keeps with `more` and not with `fewer`, on average
Worth = Callable[[int, int, int], float]


def check_multiple(shapes: list[LayerShape], multiple: int) -> None:
    """Raise InputError unless every layer has that many channels."""
    smallest = min(s.intermediate_channels for s in shapes)
    if multiple > smallest:
        raise InputError(
            f"--round-to {multiple} is more than the {smallest} FFN channels of the smallest layer, "
            "and as many stay at least; take a smaller multiple"
        )


def below(channels: float, whole: int, multiple: int) -> int:
    """The largest number of channels, of a layer with `whole`, that can be kept and is not above `channels`."""
    return whole if channels >= whole else int(channels // multiple) * multiple


def above(channels: int, whole: int, multiple: int) -> int:
    """The smallest number of channels, of a layer with `whole` > `channels`, that can be kept and is above."""
    return min((channels // multiple + 1) * multiple, whole)


def nearest(channels: float, whole: int, multiple: int) -> int:
    """The number of channels, of a layer with `whole`, that can be kept and is nearest; at least `multiple`."""
    low = max(multiple, below(channels, whole, multiple))
    high = low if low >= whole else above(low, whole, multiple)
    return low if channels - low <= high - channels else high


def rounded_counts(
    counts: RemovedCounts, shapes: list[LayerShape], ratio: float, multiple: int, worth: Worth | None = None
) -> RemovedCounts:
    """The same KV groups, and channels in multiples, so that the model meets the ratio within half a multiple.

    counts: what each layer loses, no more than leaves it `multiple` channels. worth: unless given, a layer goes up
    the sooner, the less it then lies above its own count. Where counts leave nothing to round, the ratio is met as
    well as the KV groups allow.
    """
    if multiple == 1 or not any(s.removable(FFN) for s in shapes):
        return counts
    wanted = [s.intermediate_channels - c[FFN] for c, s in zip(counts, shapes, strict=True)]
    whole = [s.intermediate_channels for s in shapes]
    value = worth or (lambda layer, fewer, more: (wanted[layer] - fewer) / (more - fewer))
    kept = [below(n, all_, multiple) for n, all_ in zip(wanted, whole, strict=True)]
    pairs = zip(counts, shapes, strict=True)
    groups = sum((s.kv_groups - c[ATTENTION]) * s.group_cost for c, s in pairs if s.removable(ATTENTION))
    missing = (1 - ratio) * total_cost(shapes) - groups - sum(kept)  # channels short of the budget
    layers = range(len(shapes))
    while missing:  # each step makes it smaller
        if missing > 0:
            steps = {i: above(kept[i], whole[i], multiple) for i in layers if kept[i] < whole[i]}
            best = max(
                (i for i, to in steps.items() if to - kept[i] < 2 * missing),
                key=lambda i: value(i, kept[i], steps[i]),
                default=None,
            )
        else:
            steps = {i: below(kept[i] - 1, whole[i], multiple) for i in layers if kept[i] > multiple}
            best = min(
                (i for i, to in steps.items() if kept[i] - to < -2 * missing),
                key=lambda i: value(i, steps[i], kept[i]),
                default=None,
            )
        if best is None:
            break
        missing -= steps[best] - kept[best]
        kept[best] = steps[best]
    return [c | {FFN: all_ - n} for c, all_, n in zip(counts, whole, kept, strict=True)]


def worth_by_scores(scores: list[UnitScores]) -> Worth:
    """The mean score of the channels, where scores compare over layers: the lowest go first."""
    ordered = [own[FFN].sort().values for own in scores]

    def worth(layer: int, fewer: int, more: int) -> float:
        own = ordered[layer]
        return float(own[len(own) - more : len(own) - fewer].mean())

    return worth


def worth_by_errors(curves: list[Tensor], shapes: list[LayerShape]) -> Worth:
    """The error that the channels' removal adds, for each; beyond the end of a layer's curve it is infinite.

    curves: of each layer's FFN, entry n the error after n removals.
    """

    def worth(layer: int, fewer: int, more: int) -> float:
        curve, channels = curves[layer], shapes[layer].intermediate_channels
        if channels - fewer >= len(curve):
            return float("inf")
        return float(curve[channels - fewer] - curve[channels - more]) / (more - fewer)

    return worth
