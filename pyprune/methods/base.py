"""What a pruning method is: the statistics it needs, how it scores units, how it chooses them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..allocation import Choice, UnitScores, choose_by_counts, uniform_counts
from ..architectures import MODULES, LayerShape
from ..errors import InputError
from ..statistics import DriverStatistics

LayerStatistics = dict[str, DriverStatistics]  # module -> statistics of its driver


@dataclass(frozen=True)
class Method(ABC):
    """A method's fields are its options; its docstring's first line is what `pyprune methods` prints.

    `needs_text`: it looks at activations. `sequential`: each layer is judged on the output of the pruned layers
    before it (else all layers are judged on the dense model, in one survey). `biased`: it writes compensation
    biases.
    """

    name: ClassVar[str]
    needs_text: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    @property
    def biased(self) -> bool:
        return False

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators of pyprune.ops that the method's statistics and choices are computed by."""
        return ("channel_moments",) if self.needs_text else ()

    @property
    def predetermined(self) -> bool:
        """Whether every layer's size follows from shapes and ratio alone."""
        return True

    def counts(self, shapes: list[LayerShape], ratio: float) -> list[dict[str, int]]:
        """Units that each layer loses, if all layers lose the same share."""
        return uniform_counts(shapes, ratio)

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        """InputError for a ratio that cannot be met, as far as the shapes alone tell."""
        self.counts(shapes, ratio)

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
