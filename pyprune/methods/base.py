"""What a pruning method is: the statistics it needs, how it scores units, how it chooses them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..allocation.budget import KeptUnits, RemovedCounts, UnitScores, check_ratio, choose_by_counts, uniform_counts
from ..allocation.common_size import common_counts, common_sizes
from ..allocation.rounding import check_multiple, rounded_counts
from ..architectures import SUBLAYERS, Family, LayerShape
from ..calibration.channel_statistics import ChannelStatistics
from ..errors import InputError

LayerStatistics = dict[str, ChannelStatistics]  # sublayer -> statistics of its output projection

# What makes up for removed units -> the methods that can do so.
COMPENSATIONS = {
    "bias": "flap, obs, policy",
    "weights": "obs, slimgpt, disp, sparsegpt",
    "none": "magnitude, wanda-sp, flap, obs, disp, policy, wanda, dass",
}


@dataclass(frozen=True)
class Method(ABC):
    """A method's fields are its options; its docstring's first line is what `pyprune methods` prints.

    `needs_text`: it looks at activations. `sequential`: each layer is judged on the output of the pruned layers before
    it (else all layers are judged on the dense model, in one calibration pass). `shrinks`: it removes units, and does
    not leave zeros in their place. `compensations`: those it can do. `uniform_defaults`: options whose default is
    another one with `uniform`.

    `uniform`: every layer keeps the same number of KV groups and of FFN channels. `round_to`: of FFN channels each
    layer keeps a multiple, or all. `compensation`: a bias on the output projection, new weights of the output
    projection, or none.
    """

    name: ClassVar[str]
    needs_text: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    compensations: ClassVar[tuple[str, ...]] = ("none",)
    uniform_defaults: ClassVar[dict[str, Any]] = {}
    uniform: bool = False
    round_to: int = 1
    compensation: str = "none"

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise InputError(f"--round-to {self.round_to} is less than 1: it is a number of FFN channels")
        if self.compensation not in self.compensations:
            others = COMPENSATIONS.get(self.compensation)
            raise InputError(
                f"{self.name} has no compensation {self.compensation!r}; one of {', '.join(self.compensations)}"
                + (f", or a method that has it: {others}" if others else "")
            )

    @property
    def adds_bias(self) -> bool:
        """Whether it writes compensation biases."""
        return self.compensation == "bias"

    @property
    def implied_ratio(self) -> float | None:
        """The ratio, where the options say it already."""
        return None

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators of pyprune.ops that the method's statistics and choices are computed by."""
        return ("channel_moments",) if self.needs_text else ()

    @property
    def sizes_known(self) -> bool:
        """Whether every layer's size follows from shapes and ratio alone."""
        return True

    def removed_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        """Units that each layer loses, of a method whose sizes are predetermined."""
        if self.uniform:
            return common_counts(shapes, ratio, self.round_to)
        return rounded_counts(self.unrounded_counts(shapes, ratio), shapes, ratio, self.round_to)

    def unrounded_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        """Units that each layer loses before channels are rounded; at least `round_to` of them stay."""
        return uniform_counts(shapes, ratio, least=self.round_to)

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        """InputError for a ratio or sizes that cannot be met, as far as the shapes alone tell."""
        check_multiple(shapes, self.round_to)
        check_ratio(shapes, ratio, self.round_to)
        if self.uniform:
            common_sizes(shapes, ratio, self.round_to)
        if self.sizes_known:
            self.removed_counts(shapes, ratio)

    def check_layers(self, family: Family, config: Any) -> None:  # noqa: B027 (most methods ask nothing more)
        """InputError for layers of which the method can make nothing, whatever the ratio."""

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check_damping(self, damping: float) -> None:
        """InputError for a damping that is no share."""
        if not 0 <= damping <= 1:
            raise InputError(f"damping {damping:g} is outside [0, 1]: it is a share of the mean of H's diagonal")

    def check_option(self, option: str, known: tuple[str, ...]) -> None:
        """InputError if the option's value is not one of those known."""
        value = getattr(self, option)
        if value not in known:
            raise InputError(f"{self.name} has no {option} {value!r}; one of {', '.join(known)}")


@dataclass(frozen=True)
class ScoringMethod(Method):
    """A method that scores channels and slices: kept weights stay as they are.

    `by_window`: it needs statistics that depend on where a window ends.
    """

    @property
    def by_window(self) -> bool:
        return False

    @abstractmethod
    def channel_scores(self, statistics: ChannelStatistics, sublayer: str) -> Tensor:
        """Importance of each input channel of the sublayer's output projection, float64 [in]."""

    def unit_scores(self, layer: LayerStatistics, shape: LayerShape) -> UnitScores:
        """Importance of each unit: a KV group is the sum of its channels."""
        return {
            sublayer: self.channel_scores(layer[sublayer], sublayer)
            .reshape(shape.units(sublayer), shape.unit_width(sublayer))
            .sum(1)
            for sublayer in SUBLAYERS
        }

    def scores(self, statistics_by_layer: list[LayerStatistics], shapes: list[LayerShape]) -> list[UnitScores]:
        return [self.unit_scores(layer, shape) for layer, shape in zip(statistics_by_layer, shapes, strict=True)]

    def choose(self, scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> KeptUnits:
        return choose_by_counts(scores, self.removed_counts(shapes, ratio))
