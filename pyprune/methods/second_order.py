"""Methods that choose units by Optimal Brain Surgeon and refit the weights that stay."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..allocation.budget import RemovedCounts
from ..allocation.residual import ErrorCurves
from ..architectures import LayerShape
from ..calibration.channel_statistics import column_norms
from ..calibration.second_moments import SecondMoments
from ..errors import InputError
from ..ops import add_split_product, damped_inverse, grouped_cholesky_errors
from .base import LayerStatistics, UnitMethod
from .options import option

NONE, MOMENTS, CURVES = "none", "moments", "curves"


@dataclass(frozen=True)
class Reconstruction:
    """An output projection after its units were chosen.

    kept: sorted indices of the units that stay, int64 on the CPU. weight: float32 [out, kept channels]; without a
    compensation as they were. bias: float32 [out], what is added to the output projection's bias, or None. scores:
    float64 [units] on the CPU, the error of removing each unit alone. damping: what the inverse took.
    """

    kept: Tensor
    weight: Tensor
    bias: Tensor | None
    scores: Tensor
    damping: float


def damping_option() -> Any:
    """The option `damping`: λ of H + λ mean(diag H) I."""
    return option(
        0.01,
        minimum=0,
        maximum=1,
        help="Added to H's diagonal, as a share of its mean.",
        meaning="it is a share of the mean of H's diagonal",
    )


def first_share_option() -> Any:
    """The option `first_share` of a method whose ratios rise with depth."""
    return option(
        None,
        help="The first layer's ratio as a share of --ratio, where ratios rise (log, linear).",
        default_text="0, if possible",
    )


@dataclass(frozen=True)
class SecondOrderMethod(UnitMethod):
    """A sequential method on the second moments of each output projection's inputs.

    `centred`: statistics about the mean, and a bias. `effective_target_share`: α, the share of the residual stream's
    error that the output projection takes on (0: none; no dense stream is carried then). `effective_input_share`: β,
    the share of the difference between the dense and the pruned stream that the matrices reading the stream (q, k, v,
    gate, up) make up; only with a target share. `dense_statistics`: the dense model's statistics that the allocation
    needs.
    """

    procedure: ClassVar[str] = "reconstruct"
    sequential: ClassVar[bool] = True
    damping: float = damping_option()

    @property
    def refits(self) -> bool:
        """Whether the weights that stay change."""
        return self.compensation != "none"

    @property
    def centred(self) -> bool:
        return False

    @property
    def effective_target_share(self) -> float:
        return 0.0

    @property
    def effective_input_share(self) -> float:
        return 0.0

    @property
    def dense_statistics(self) -> str:
        return NONE

    @property
    def allocation_windows(self) -> int:
        """Windows of the calibration pass of error curves."""
        return 0

    @property
    def operators(self) -> tuple[str, ...]:
        moments = ("channel_moments",) if self.dense_statistics == MOMENTS else ()
        return (*moments, "hessian", "grouped_cholesky_errors", "eliminate")

    def allocate(
        self,
        shapes: list[LayerShape],
        ratio: float,
        curves: list[ErrorCurves] | None,
        moments: list[LayerStatistics] | None,
    ) -> RemovedCounts:
        """Units that each layer loses; statistics that `dense_statistics` does not name are None."""
        subset, shapes = self.subset(shapes), self.prunable(shapes)
        own_curves = None if curves is None else subset.select(curves)
        own_moments = None if moments is None else subset.select(moments)
        own_ratio = subset.ratio(shapes, ratio)
        return subset.spread(self.allocate_within(subset.select(shapes), own_ratio, own_curves, own_moments))

    @abstractmethod
    def allocate_within(
        self,
        shapes: list[LayerShape],
        ratio: float,
        curves: list[ErrorCurves] | None,
        moments: list[LayerStatistics] | None,
    ) -> RemovedCounts:
        """`allocate` in the layers that may lose units."""

    @abstractmethod
    def remove(self, inverse: Tensor, weight: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Remove `count` > 0 units of `width` columns: (removed units, the kept columns after compensation).

        inverse: A [in, in] float32, may be overwritten; weight [out, in] float32, may be overwritten.
        """

    def reconstruct(
        self, second_moments: SecondMoments, weight: Tensor, count: int, width: int, where: str
    ) -> Reconstruction:
        """Choose `count` units of the output projection to remove and refit the others; the second moments are used up.

        weight [out, in], any float type, on the second moments's device. Raises InputError, naming `where`, for NaN or
        Inf weights, and if the Hessian cannot be inverted even with a thousand times the damping.
        """
        column_norms(weight, where)  # names NaN and Inf
        damped = damped_inverse(second_moments.take_hessian(), self.damping, where)
        inverse = damped.inverse
        target = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        bias = self._output_on_average(second_moments, target) if self.centred else None
        if self.effective_target_share:
            cross, share = second_moments.take_cross(), self.effective_target_share
            add_split_product(target, cross, inverse, share)  # A is symmetric
        target[:, damped.dead] = 0
        scores = single_errors(inverse, target, width).double().cpu()
        units = target.shape[1] // width
        if count:
            removed, refitted = self.remove(inverse, target, count, width)
        else:
            removed, refitted = torch.empty(0, dtype=torch.int64), target
        if not refitted.isfinite().all():
            raise InputError(
                f"{where}: the refit overflows float32, or columns that go depend on each other; raise --damping, or "
                "give more calibration text"
            )
        mask = torch.ones(units, dtype=torch.bool)
        mask[removed.cpu()] = False
        kept = mask.nonzero().flatten()
        channels = mask.repeat_interleave(width).nonzero().flatten().to(weight.device)
        if not self.refits:
            refitted = weight[:, channels].to(target.dtype)  # dead columns too as they were
        if bias is not None:
            assert second_moments.mean is not None
            bias -= refitted @ second_moments.mean[channels]
        return Reconstruction(kept, refitted, bias, scores, damped.damping)

    def _output_on_average(self, second_moments: SecondMoments, dense: Tensor) -> Tensor:
        """Mean output to preserve, [out]: W m, and the target share of the mean stream error."""
        assert second_moments.mean is not None
        average = dense @ second_moments.mean
        if self.effective_target_share:
            assert second_moments.stream_error is not None
            average += self.effective_target_share * second_moments.stream_error
        return average


def single_errors(inverse: Tensor, weight: Tensor, width: int) -> Tensor:
    """The error of removing each unit alone, tr(W_g A_gg^-1 W_g^T), [units]."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    return grouped_cholesky_errors(inverse, weight.T @ weight, width)
