from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..allocation.budget import RemovedCounts
from ..allocation.depth_schedule import SCHEDULES, incremental_counts
from ..allocation.residual import ErrorCurves
from ..architectures import LayerShape
from ..errors import InputError
from ..ops import grouped_cholesky_errors
from .base import LayerStatistics, compensation_option
from .options import option
from .registry import register
from .second_order import SecondOrderMethod, first_share_option

# Dynamic group size (arXiv 2412.18110, algorithm 1 and the authors' settings): half of what is to be removed beyond
# the last GROUP_SLACK columns, within these bounds.
GROUP_SLACK, SMALLEST_GROUP, LARGEST_GROUP = 512, 64, 1024


@register
@dataclass(frozen=True)
class SlimGpt(SecondOrderMethod):
    """SlimGPT: OBS on heads and channels, grouped Cholesky, dynamic group size, incremental ratio (arXiv 2412.18110).

    `schedule`: how the ratio rises with depth (log, linear, uniform); `first_share`: the first layer's ratio r_0 as
    a share of the whole ratio. With `uniform` the schedule is uniform.
    """

    name = "slimgpt"
    source = "arXiv 2412.18110 (SlimGPT, Ling et al.)"
    uniform_defaults: ClassVar[dict[str, Any]] = {"schedule": "uniform"}
    compensation: str | None = compensation_option("weights")
    schedule: str = option("log", choices=SCHEDULES, help="How ratios rise with depth.")
    first_share: float | None = first_share_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.uniform and self.schedule != "uniform":
            raise InputError(
                f"--uniform makes all layers alike, --schedule {self.schedule} does not: leave one of them out"
            )

    def unrounded_counts(self, shapes: list[LayerShape], ratio: float) -> RemovedCounts:
        return incremental_counts(shapes, ratio, self.schedule, self.first_share, self.multiple)

    def allocate_within(
        self,
        shapes: list[LayerShape],
        ratio: float,
        curves: list[ErrorCurves] | None,
        moments: list[LayerStatistics] | None,
    ) -> RemovedCounts:
        return self.counts_within(shapes, ratio)

    def remove(self, inverse: Tensor, weight: Tensor, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Algorithm 1: heads one at a time by grouped Cholesky, channels in groups of dynamic size."""
        units = weight.shape[1] // width
        gone = torch.zeros(units, dtype=torch.bool, device=weight.device)
        for size in dynamic_groups(count) if width == 1 else [1] * count:
            norms = weight.square().sum(0)  # [in]
            if width == 1:
                errors = norms / inverse.diagonal()
            else:
                errors = grouped_cholesky_errors(inverse, torch.diag(norms), width, diagonal=True)
            errors = torch.where(gone, torch.inf, errors)
            chosen = torch.sort(errors, stable=True).indices[:size]
            gone[chosen] = True
            columns = (chosen[:, None] * width + torch.arange(width, device=chosen.device)).flatten()
            remove_columns(inverse, weight, columns)
        kept = (~gone).repeat_interleave(width)
        return gone.nonzero().flatten(), weight[:, kept]


def dynamic_groups(count: int) -> list[int]:
    """Columns removed at each step, `count` in all: 2202 -> 845, 166, 64 x 18, 39."""
    sizes = []
    group = (count - GROUP_SLACK) // 2
    while count:
        sizes.append(min(count, max(group, SMALLEST_GROUP), LARGEST_GROUP))
        count -= sizes[-1]
        group = (group - GROUP_SLACK) // 2
    return sizes


def remove_columns(inverse: Tensor, weight: Tensor, columns: Tensor) -> None:
    """W ← W − W_S A_SS⁻¹ A_S: and A ← A − A_:S A_SS⁻¹ A_S:, in place; columns S become zero, up to rounding.

    The same as inverting the damped Hessian of the columns that are left, as the paper does, at a rank-|S| update's
    cost. NaN everywhere where A_SS is not positive definite in float32: the refit is then refused as a whole.
    """
    rows = inverse[columns]  # [S, in]
    lower, failed = torch.linalg.cholesky_ex(rows[:, columns])
    lower.masked_fill_(failed != 0, torch.nan)
    half = torch.linalg.solve_triangular(lower, rows, upper=False)  # L⁻¹ A_S:
    own = torch.linalg.solve_triangular(lower, weight[:, columns].T, upper=False)  # L⁻¹ W_Sᵀ
    weight.addmm_(own.T, half, alpha=-1)
    inverse.addmm_(half.T, half, alpha=-1)
