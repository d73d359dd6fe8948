"""What a pruning method is: the statistics it needs, how it scores units, how it chooses them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..allocation.budget import Choice, Counts, UnitScores, check_ratio, choose_by_counts, uniform_counts
from ..allocation.common_size import common_counts, common_sizes
from ..allocation.rounding import check_multiple, rounded_counts
from ..architectures import MODULES, Family, LayerShape
from ..calibration.channel_statistics import DriverStatistics
from ..errors import InputError

LayerStatistics = dict[str, DriverStatistics]  # module -> statistics of its driver

# What makes up for removed units -> the methods that can do so.
COMPENSATIONS = {
    "bias": "flap, obs, policy",
    "weights": "obs, slimgpt, disp, sparsegpt",
    "none": "magnitude, wanda-sp, flap, obs, disp, policy, wanda, dass",
}


@dataclass(frozen=True)
class Method(ABC):
    """A method's fields are its options; its docstring's first line is what `pyprune methods` prints.

    `needs_text`: it looks at activations. `sequential`: each layer is judged on the output of the pruned layers
    before it (else all layers are judged on the dense model, in one survey). `shrinks`: it removes units, and does not
    leave zeros in their place. `compensations`: those it can do.
    `with_uniform`: options whose default is another one with `uniform`.

    `uniform`: every layer keeps the same number of KV groups and of FFN channels. `round_to`: of FFN channels each
    layer keeps a multiple, or all. `compensation`: a bias on the driver, new weights of the driver, or none.
    """

    name: ClassVar[str]
    needs_text: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    compensations: ClassVar[tuple[str, ...]] = ("none",)
    with_uniform: ClassVar[dict[str, Any]] = {}
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
    def biased(self) -> bool:
        """Whether it writes compensation biases."""
        return self.compensation == "bias"

    @property
    def own_ratio(self) -> float | None:
        """The ratio, where the options say it already."""
        return None

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators of pyprune.ops that the method's statistics and choices are computed by."""
        return ("channel_moments",) if self.needs_text else ()

    @property
    def predetermined(self) -> bool:
        """Whether every layer's size follows from shapes and ratio alone."""
        return True

    def counts(self, shapes: list[LayerShape], ratio: float) -> Counts:
        """Units that each layer loses, of a method whose sizes are predetermined."""
        if self.uniform:
            return common_counts(shapes, ratio, self.round_to)
        return rounded_counts(self.shares(shapes, ratio), shapes, ratio, self.round_to)

    def shares(self, shapes: list[LayerShape], ratio: float) -> Counts:
        """Units that each layer loses before channels are rounded; at least `round_to` of them stay."""
        return uniform_counts(shapes, ratio, least=self.round_to)

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        """InputError for a ratio or sizes that cannot be met, as far as the shapes alone tell."""
        check_multiple(shapes, self.round_to)
        check_ratio(shapes, ratio, self.round_to)
        if self.uniform:
            common_sizes(shapes, ratio, self.round_to)
        if self.predetermined:
            self.counts(shapes, ratio)

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
    def channel_scores(self, statistics: DriverStatistics, module: str) -> Tensor:
        """Importance of each input channel of the module's driver, float64 [in]."""

    def unit_scores(self, layer: LayerStatistics, shape: LayerShape) -> UnitScores:
        """Importance of each unit: a KV group is the sum of its channels."""
        return {
            module: self.channel_scores(layer[module], module)
            .reshape(shape.units(module), shape.unit_width(module))
            .sum(1)
            for module in MODULES
        }

    def scores(self, survey: list[LayerStatistics], shapes: list[LayerShape]) -> list[UnitScores]:
        return [self.unit_scores(layer, shape) for layer, shape in zip(survey, shapes, strict=True)]

    def choose(self, scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> Choice:
        return choose_by_counts(scores, self.counts(shapes, ratio))
