"""Base classes of pruning methods: statistics, scores and choice of units."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..allocation.budget import (
    KeptUnits,
    RemovedCounts,
    UnitScores,
    check_ratio,
    choose_by_counts,
    most_removable,
    uniform_counts,
)
from ..allocation.common_size import common_counts, common_sizes
from ..allocation.layers import LayerSubset, check_layers_ratio, layer_subset, most_removable_of, parse_layers
from ..allocation.rounding import check_multiple, rounded_counts
from ..allocation.units import parse_units, with_units
from ..architectures import FFN, SUBLAYERS, Family, LayerShape
from ..calibration.channel_statistics import ChannelStatistics
from ..errors import InputError
from .options import option, options_of
from .registry import methods_of_choice

# A multiple that fills the tiles of GPU matrix products, and the channels of a layer from which on it costs little: on
# smaller layers it would move the ratio.
ROUNDED, ROUNDED_FROM = 128, 4096

LayerStatistics = dict[str, ChannelStatistics]  # sublayer -> statistics of its output projection


class Training(Protocol):
    """Training of masks on the whole frozen model: `steps` of `rows` windows each.

    `backward`: training needs gradients through the model, not forwards alone.
    """

    @property
    def steps(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def backward(self) -> bool: ...


@dataclass(frozen=True)
class Method(ABC):
    """A pruning method with its options.

    Every field is declared by `option`, every concrete class is `register`ed under its `name`; the docstring's first
    line is what `pyprune methods` prints.

    `source`: the paper, for `pyprune methods NAME`. `procedure`: which passes the method runs: a key of
    `passes.PASSES` and of `estimation.procedures.PROCEDURES`.
    `needs_text`: it looks at activations. `sequential`: each layer is judged on the output of the pruned layers before
    it (else all layers are judged on the dense model, in one calibration pass). `shrinks`: it makes matrices smaller,
    and does not leave zeros in their place. `uniform_defaults`: option defaults that apply with `uniform`.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    procedure: ClassVar[str]
    needs_text: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True
    sequential: ClassVar[bool] = False
    uniform_defaults: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for name, own in options_of(type(self)).items():
            value = getattr(self, name)
            try:
                own.check(self.name, value)
            except InputError as error:
                others = methods_of_choice(name, value)
                if not others:
                    raise
                raise InputError(f"{error}, or a method that has it: {', '.join(others)}") from None

    @property
    def adds_bias(self) -> bool:
        """Whether it writes compensation biases."""
        return False

    @property
    def implied_ratio(self) -> float | None:
        """The ratio, where the options say it already."""
        return None

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators of pyprune.ops that the method's statistics and choices are computed by."""
        return ("channel_moments",) if self.needs_text else ()

    @property
    def spares_layers(self) -> bool:
        """Whether it leaves some layers as large as they are."""
        return False

    @property
    def training(self) -> Training | None:
        """Settings of training on the whole model; None for methods that do not train."""
        return None

    def known_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts | None:
        """Units that each layer loses, where that follows from shapes and ratio alone."""
        return None

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        """InputError for a ratio or sizes that cannot be met, as far as the shapes alone tell."""
        check_ratio(shapes, ratio)

    def most_removable(self, shapes: list[LayerShape]) -> float:
        """The largest ratio, as far as what has to stay in every layer says it."""
        return most_removable(shapes)

    def check_layers(self, family: Family, config: Any) -> None:  # noqa: B027 (most methods ask nothing more)
        """InputError for layers that the method cannot prune at any ratio."""

    def prunable(self, shapes: list[LayerShape]) -> list[LayerShape]:
        """The shapes, with what the options leave alone fixed. InputError: nothing is left that may go."""
        return shapes

    def fitted(self, shapes: list[LayerShape], biased: bool = False) -> Self:
        """The method with the option defaults that follow from the model.

        biased: whether every output projection has a bias.
        """
        return self

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def compensation_option(*kinds: str, default_text: str | None = None) -> Any:
    """The option `compensation` of a method that knows these kinds.

    The first is the default; with `default_text`, which says it in words, the model decides.
    """
    return option(
        None if default_text else kinds[0],
        choices=kinds,
        help="What makes up for removed units: a bias on the output projection, new weights of it, or none.",
        default_text=default_text,
    )


@dataclass(frozen=True)
class UnitMethod(Method):
    """A method that removes whole KV groups and FFN channels, a number in each layer that an allocation says.

    Its public functions are given all layers of the model and the ratio of all their linears; those named `…_within`,
    which methods override, the layers that may lose units and the ratio of these.
    """

    uniform: bool = option(
        False, help="The same number of KV groups and FFN channels in every layer, as stock model classes need."
    )
    round_to: int | None = option(
        None,
        minimum=1,
        help="Keep FFN channels in multiples of this, or all of a layer's: GPUs multiply such sizes at full speed; "
        "256 suits llama.cpp's K-quants.",
        meaning="it is a number of FFN channels",
        default_text=f"{ROUNDED} from {ROUNDED_FROM} FFN channels in a layer on, else 1",
    )
    compensation: str | None = compensation_option("none")
    layers: str | None = option(
        None,
        help="Layers that may lose units, counted from 0: 4-29, or 2-5,8,10-; --ratio stays the share of all layers.",
        default_text="all",
    )

    units: str | None = option(
        None,
        help="Units that may go: kv-groups (heads where all query heads share one key and value head), channels, or "
        "both with a comma; --ratio is the share of the parameters of these.",
        default_text="all that the model's layers can lose",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.units is not None:
            parse_units(self.units)
        if self.layers is not None:
            parse_layers(self.layers)
            if self.uniform:
                raise InputError(
                    f"--uniform makes all layers alike, --layers {self.layers} does not: leave one of them out"
                )

    def fitted(self, shapes: list[LayerShape], biased: bool = False) -> Self:
        return self if self.round_to is not None else replace(self, round_to=self.default_multiple(shapes))

    def default_multiple(self, shapes: list[LayerShape]) -> int:
        """The value of `round_to` where none is given."""
        channels = [shape.intermediate_channels for shape in shapes]
        return ROUNDED if max(channels) >= ROUNDED_FROM and min(channels) >= ROUNDED else 1

    @property
    def multiple(self) -> int:
        """FFN channels are kept in multiples of this."""
        return self.round_to or 1

    @property
    def adds_bias(self) -> bool:
        return self.compensation == "bias"

    @property
    def spares_layers(self) -> bool:
        return self.layers is not None

    @property
    def sizes_known(self) -> bool:
        """Whether every layer's size follows from shapes and ratio alone."""
        return True

    def prunable(self, shapes: list[LayerShape]) -> list[LayerShape]:
        return with_units(shapes, self.units)

    def subset(self, shapes: list[LayerShape]) -> LayerSubset:
        """The layers that may lose units. InputError: the model does not have all of them."""
        return layer_subset(self.layers, len(shapes))

    def ratio_within(self, shapes: list[LayerShape], ratio: float) -> float:
        """Ratio within the layers that may lose units, for `ratio` over all layers."""
        return self.subset(shapes).ratio(self.prunable(shapes), ratio)

    def removed_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        """Units that each layer loses, of a method whose sizes are known."""
        subset, shapes = self.subset(shapes), self.prunable(shapes)
        return subset.spread(self.counts_within(subset.select(shapes), subset.ratio(shapes, ratio)))

    def known_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts | None:
        return self.removed_counts(shapes, ratio) if self.sizes_known else None

    def counts_within(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        if self.uniform:
            return common_counts(shapes, ratio, self.multiple)
        return rounded_counts(self.unrounded_counts(shapes, ratio), shapes, ratio, self.multiple)

    def unrounded_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        """Units that each layer loses before channels are rounded; at least `multiple` of them stay."""
        return uniform_counts(shapes, ratio, least=self.multiple)

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        subset, shapes = self.subset(shapes), self.prunable(shapes)
        if self.layers is None:
            self.check_within(shapes, ratio)
            return
        check_layers_ratio(subset, self.layers, shapes, ratio, self.multiple)
        try:
            self.check_within(subset.select(shapes), subset.ratio(shapes, ratio))
        except InputError as error:
            raise InputError(f"{error} (ratios are those of --layers {self.layers} alone)") from error

    def most_removable(self, shapes: list[LayerShape]) -> float:
        return most_removable_of(self.subset(shapes), self.prunable(shapes), self.multiple)

    def check_within(self, shapes: list[LayerShape], ratio: float) -> None:
        if any(shape.removable(FFN) for shape in shapes):
            check_multiple(shapes, self.multiple)
        check_ratio(shapes, ratio, self.multiple)
        if self.uniform:
            common_sizes(shapes, ratio, self.multiple)
        if self.sizes_known:
            self.counts_within(shapes, ratio)


def no_scores() -> Tensor:
    """The scores of a sublayer without units."""
    return torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class ScoringMethod(UnitMethod):
    """A method that scores channels and slices: kept weights stay as they are.

    `by_window`: it needs statistics that depend on where a window ends.
    """

    procedure: ClassVar[str] = "slice"

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
            if sublayer in layer
            else no_scores()
            for sublayer in SUBLAYERS
        }

    def scores(self, statistics_by_layer: list[LayerStatistics], shapes: list[LayerShape]) -> list[UnitScores]:
        return [self.unit_scores(layer, shape) for layer, shape in zip(statistics_by_layer, shapes, strict=True)]

    def choose(self, scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> KeptUnits:
        """The units that stay in every layer."""
        subset, shapes = self.subset(shapes), self.prunable(shapes)
        own = self.choose_within(subset.select(scores), subset.select(shapes), subset.ratio(shapes, ratio))
        return subset.spread_kept(own, shapes)

    def choose_within(self, scores: list[UnitScores], shapes: list[LayerShape], ratio: float) -> KeptUnits:
        return choose_by_counts(scores, self.counts_within(shapes, ratio))
