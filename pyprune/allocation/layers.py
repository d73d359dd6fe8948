"""Parse `--layers`, the layers that may lose units: numbers from 0 and ranges, `4-29` or `2-5,8,10-`."""

import re
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..architectures import SUBLAYERS, LayerShape
from ..errors import InputError
from .budget import KeptUnits, RemovedCounts, check_ratio, total_cost

T = TypeVar("T")


def parse_layers(text: str) -> list[tuple[int, int | None]]:
    """Ranges (first, last) of layers, both inclusive; last None: up to the model's end. InputError for another text."""
    ranges: list[tuple[int, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d+)?)?\s*", part, re.ASCII)
        if match is None:
            raise InputError(
                f"--layers {text!r}: {part!r} is no layer and no range of layers; write 4-29, or 2-5,8,10- (from 0, "
                "both ends inclusive)"
            )
        first = int(match[1])
        last = first if match[2] is None else None if match[3] is None else int(match[3])
        if last is not None and last < first:
            raise InputError(f"--layers {text!r}: {part.strip()!r} ends before it begins")
        ranges.append((first, last))
    return ranges


@dataclass(frozen=True)
class LayerSubset:
    """The layers of a model that may lose units: sorted, of `total` layers."""

    layers: list[int]
    total: int

    @property
    def whole(self) -> bool:
        return len(self.layers) == self.total

    def select(self, items: list[T]) -> list[T]:
        """Select the subset's items from one item a layer."""
        return [items[layer] for layer in self.layers]

    def ratio(self, shapes: list[LayerShape], ratio: float) -> float:
        """Ratio within the subset that amounts to `ratio` of all decoder linears of the model; it may be 1 or more."""
        return ratio if self.whole else ratio * total_cost(shapes) / total_cost(self.select(shapes))

    def spread(self, counts: RemovedCounts) -> RemovedCounts:
        """Units removed of the subset's layers -> of the model's: the other layers lose none."""
        found = [dict.fromkeys(SUBLAYERS, 0) for _ in range(self.total)]
        for layer, own in zip(self.layers, counts, strict=True):
            found[layer] = own
        return found

    def spread_kept(self, choice: KeptUnits, shapes: list[LayerShape]) -> KeptUnits:
        """A choice in the subset's layers -> in the model's: the other layers keep every unit."""
        if self.whole:
            return choice
        layers = [{sublayer: torch.arange(shape.units(sublayer)) for sublayer in SUBLAYERS} for shape in shapes]
        for layer, own in zip(self.layers, choice.layers, strict=True):
            layers[layer] = own
        return KeptUnits(layers, choice.threshold)


def layer_subset(text: str | None, total: int) -> LayerSubset:
    """The layers that `text` names, all if it is None. InputError: the model of `total` layers has not all of them."""
    if text is None:
        return LayerSubset(list(range(total)), total)
    layers: set[int] = set()
    for first, last in parse_layers(text):
        largest = first if last is None else last
        if largest >= total:
            raise InputError(f"--layers {text}: there is no layer {largest}; the model has layers 0 to {total - 1}")
        layers.update(range(first, total if last is None else last + 1))
    return LayerSubset(sorted(layers), total)


def most_removable_of(subset: LayerSubset, shapes: list[LayerShape], least: int) -> float:
    """The largest ratio of the whole model that the subset can give."""
    own = subset.select(shapes)
    return (total_cost(own) - sum(shape.least_cost(least) for shape in own)) / total_cost(shapes)


def check_layers_ratio(subset: LayerSubset, text: str, shapes: list[LayerShape], ratio: float, least: int) -> None:
    """InputError for a ratio of the whole model that the subset, named by `text`, cannot give."""
    check_ratio(shapes, ratio, least)
    most = most_removable_of(subset, shapes, least)
    if ratio > most:
        channels = "one FFN channel" if least == 1 else f"{least} FFN channels"
        raise InputError(
            f"ratio {ratio:g} is impossible with --layers {text}: it is a share of all decoder linears, one KV group "
            f"and {channels} stay in every layer, so at most {most:.4f} can be removed from these layers"
        )
