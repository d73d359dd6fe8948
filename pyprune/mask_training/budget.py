"""Share of a model that its gates keep, and hard masks that keep exactly the share asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..architectures import LayerShape
from ..architectures.channel_selection import SELECTIONS, ChannelSelection, selected_parameters, width
from ..errors import InputError

Count = TypeVar("Count", float, Tensor)

# Largest deviation of the selections from the ratio: each index is a small share of any real model.
TOLERANCE = 0.005


def kept_share(shapes: list[LayerShape], counts: Sequence[Mapping[str, Count]]) -> Count:
    """Share of the decoder linears' parameters that stay, by the number of channels of every selection."""
    dense = sum(shape.parameters for shape in shapes)
    kept: Any = sum(selected_parameters(shape, own) for shape, own in zip(shapes, counts, strict=True))
    return kept / dense


def most_selected_away(shapes: list[LayerShape], multiple: int) -> float:
    """The largest ratio that leaves `multiple` channels, or all, in every selection."""
    least = [{name: min(multiple, width(shape, name)) for name in SELECTIONS} for shape in shapes]
    return 1 - kept_share(shapes, least)


def check_selections(shapes: list[LayerShape], ratio: float, multiple: int) -> None:
    """InputError unless the ratio lies in (0, 1) and leaves `multiple` channels, or all, in every selection."""
    if not 0 < ratio < 1:
        raise InputError(f"ratio {ratio:g} is outside (0, 1): it is the share of decoder parameters to remove")
    most = most_selected_away(shapes, multiple)
    if ratio > most:
        channels = "one channel stays" if multiple == 1 else f"{multiple} channels stay"
        raise InputError(
            f"ratio {ratio:g} is impossible: {channels} in every selection, so at most {most:.4f} can be removed from "
            "this model"
        )


def select(
    shapes: list[LayerShape], logits: list[dict[str, Tensor]], ratio: float, multiple: int = 1
) -> list[ChannelSelection]:
    """The channels of the highest logits, by one threshold over the model that keeps 1 - ratio of it.

    logits: by layer and selection, [width] any floating type. Every selection keeps a multiple of `multiple` channels,
    or all, and at least `multiple`; of equal logits the first channels stay. InputError where no threshold comes
    within TOLERANCE of the ratio, which a coarse multiple in a small model can cause.
    """
    check_selections(shapes, ratio, multiple)
    ordered = [
        {name: own[name].double().cpu().sort(descending=True, stable=True) for name in SELECTIONS} for own in logits
    ]

    def counts(threshold: float) -> list[dict[str, int]]:
        return [
            {
                name: rounded(int((own[name].values > threshold).sum()), len(own[name].values), multiple)
                for name in SELECTIONS
            }
            for own in ordered
        ]

    found = counts(_threshold(lambda t: kept_share(shapes, counts(t)), ordered, 1 - ratio))
    met = 1 - kept_share(shapes, found)
    if abs(met - ratio) > TOLERANCE:
        raise InputError(
            f"ratio {ratio:g} cannot be met with selections in multiples of {multiple}: {met:.4f} is as near as it "
            "gets; take a smaller --round-to"
        )
    return [
        {name: own[name].indices[: count[name]].sort().values for name in SELECTIONS}
        for own, count in zip(ordered, found, strict=True)
    ]


def rounded(count: int, most: int, multiple: int) -> int:
    """The nearest multiple, at least one of them; all `most` channels where that is nearer or less."""
    near = max(multiple, multiple * round(count / multiple))
    return most if near > most or abs(most - count) < abs(near - count) else near


def _threshold(kept: Callable[[float], float], ordered: list[dict[str, Any]], target: float) -> float:
    """Bisect for the threshold whose kept share is nearest; kept shares fall as thresholds rise."""
    low = min(float(own[name].values[-1]) for own in ordered for name in SELECTIONS) - 1.0  # keeps everything
    high = max(float(own[name].values[0]) for own in ordered for name in SELECTIONS) + 1.0
    for _ in range(64):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if kept(middle) > target else (low, middle)
    return min((low, high), key=lambda t: abs(kept(t) - target))


def shift_to_budget(kept: Callable[[float], float], target: float, bound: float = 60.0) -> float:
    """Find the shift of all logits at which `kept`, which rises with it, is the target."""
    low, high = -bound, bound
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) > target else (middle, high)
    return (low + high) / 2
