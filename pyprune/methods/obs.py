from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from ..allocation.budget import RemovedCounts, counts_of
from ..allocation.common_size import cheapest_counts
from ..allocation.depth_schedule import incremental_counts
from ..allocation.residual import ErrorCurves, residual_counts
from ..architectures import LayerShape
from ..errors import InputError
from ..ops import eliminate, lower_gram, refit
from .base import LayerStatistics, compensation_option
from .flap import Flap
from .options import option
from .registry import register
from .second_order import CURVES, MOMENTS, NONE, SecondOrderMethod, first_share_option

ALLOCATIONS = ("residual", "log", "linear", "uniform", "fluctuation")
TARGETS = ("residual", "weights")


@register
@dataclass(frozen=True)
class Obs(SecondOrderMethod):
    """Exact greedy OBS: units one by one by exact error, residual allocation and target, least-squares refit (ours).

    `allocation`: residual (error in the residual stream, from a calibration pass), log, linear, uniform, or fluctuation
    (FLAP's z-scores). `target`: residual (an output projection also makes up, by `target_share`, for what earlier
    layers lost, and q, k, v, gate and up, by `input_share`, for how the stream that they read has changed) or weights
    (only its own output). `compensation`: weights (no bias: loads in any engine), bias (centred; weights as well; free
    where output projections have biases, hence the default there), or none: the weights that stay are as they were, and
    there is no target. `first_share`: log and linear: the first layer's ratio as a
    share of the whole ratio. `allocation_samples`: windows of the text that the residual allocation's calibration pass
    looks at.

    With `uniform`, the residual allocation decides between KV groups and channels, the uniform one takes the same
    share of both.
    """

    name = "obs"
    source = "this project, from Optimal Brain Surgeon (Hassibi and Stork, 1993)"
    compensation: str | None = compensation_option(
        "weights", "bias", "none", default_text="bias where all output projections have one, else weights"
    )
    allocation: str = option(
        "residual",
        choices=ALLOCATIONS,
        help="How many units each layer loses; with --uniform, how it is split between KV groups and channels: "
        "residual (by error) or uniform (the same share).",
    )
    target: str = option("residual", choices=TARGETS, help="What the output projection is fitted to.")
    target_share: float = option(
        0.5,
        above=0,
        maximum=1,
        help="Share of the residual stream's error that an output projection makes up.",
        meaning="it is a share of the stream error",
    )
    input_share: float = option(
        1.0,
        minimum=0,
        maximum=1,
        help="Share of the inputs' change that q, k, v, gate, up make up.",
        meaning="it is a share of the difference",
    )
    first_share: float | None = first_share_option()
    allocation_samples: int = option(
        32,
        minimum=1,
        help="Calibration windows that the residual allocation looks at.",
        meaning="the calibration pass needs a window",
        aliases=("survey_samples",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform and self.allocation not in ("residual", "uniform"):
            raise InputError(
                f"--uniform makes all layers alike, --allocation {self.allocation} does not: leave one of them out"
            )

    def fitted(self, shapes: list[LayerShape], biased: bool = False) -> Self:
        chosen = self.compensation or ("bias" if biased else "weights")
        return replace(super().fitted(shapes, biased), compensation=chosen)

    @property
    def centred(self) -> bool:
        return self.adds_bias

    @property
    def effective_target_share(self) -> float:
        return self.target_share if self.target == "residual" and self.refits else 0.0

    @property
    def effective_input_share(self) -> float:
        return self.input_share if self.target == "residual" and self.refits else 0.0

    @property
    def dense_statistics(self) -> str:
        return {"residual": CURVES, "fluctuation": MOMENTS}.get(self.allocation, NONE)

    @property
    def allocation_windows(self) -> int:
        return self.allocation_samples

    @property
    def sizes_known(self) -> bool:
        return self.dense_statistics == NONE

    def unrounded_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        return incremental_counts(shapes, ratio, self.allocation, self.first_share, self.multiple)

    def allocate_within(
        self,
        shapes: list[LayerShape],
        ratio: float,
        curves: list[ErrorCurves] | None,
        moments: list[LayerStatistics] | None,
    ) -> RemovedCounts:
        if curves is not None:
            allocated = cheapest_counts if self.uniform else residual_counts
            return allocated(curves, shapes, ratio, self.multiple)
        if moments is not None:
            flap = Flap(round_to=self.multiple)
            return counts_of(flap.choose(flap.scores(moments, shapes), shapes, ratio), shapes)
        return self.counts_within(shapes, ratio)

    def remove(self, inverse: Tensor, weight: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Every unit by its exact error after all removals before it; then, unless weights stay, one refit."""
        elimination = eliminate(inverse, lower_gram(weight), count, width, keep_factor=self.refits)
        if self.refits:
            return elimination.order, refit(weight, elimination)
        return elimination.order, weight[:, elimination.kept_channels()]
