"""Second moments of a driver's inputs, and of how they go with what the residual stream is short of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import Hessian, damped_inverse
from ..ops.precision import exact_float32
from ..runtime import distributed


@dataclass
class Curvature:
    """Statistics of one driver, its input x [in] over `count` tokens; float32 on its device.

    hessian: [in, in] Σ x xᵀ; centred, Σ (x − m)(x − m)ᵀ. mean: m [in], if centred. cross: [out, in] Σ r xᵀ, or
    Σ (r − r̄)(x − m)ᵀ, r the shortfall of the residual stream right after the module; shortfall: r̄ [out]. The last
    two where a dense stream is carried.
    """

    hessian: Tensor
    count: int
    mean: Tensor | None = None
    cross: Tensor | None = None
    shortfall: Tensor | None = None

    def take_hessian(self) -> Tensor:
        """The Hessian, handed over for good, so that its memory is free once the caller is through with it."""
        hessian, self.hessian = self.hessian, self.hessian.new_empty(0, 0)
        return hessian

    def take_cross(self) -> Tensor:
        """`cross`, handed over for good; it has to be there."""
        assert self.cross is not None
        cross, self.cross = self.cross, None
        return cross


class CurvatureObserver:
    """Accumulates the curvature of one driver while its inputs pass by.

    `where` names layer and driver in errors. `centred`: about the means. With `allow_nonfinite`, NaN and Inf count
    as zero and are tallied in `nonfinite`; otherwise `finish` raises InputError if any came. In several processes each
    sees its own inputs, and `finish` gives all of them the statistics, and `nonfinite`, of all inputs.
    """

    def __init__(self, channels: int, device: torch.device, where: str, centred: bool, allow_nonfinite: bool) -> None:
        self.where, self.centred, self.allow_nonfinite = where, centred, allow_nonfinite
        self.hessian = Hessian.zeros(channels, device, sums=centred)
        self.cross: Tensor | None = None
        self.shortfalls: Tensor | None = None
        self.nonfinite = 0

    def observe(self, x: Tensor) -> Tensor:
        """x: [..., in], the driver's input. Returns it as rows [tokens, in], as it was counted."""
        rows = x.reshape(-1, x.shape[-1])
        if self.allow_nonfinite:
            bad = ~torch.isfinite(rows)
            self.nonfinite += int(bad.sum())
            rows = rows.masked_fill(bad, 0)
        self.hessian.update(rows)
        return rows

    def observe_shortfall(self, rows: Tensor, shortfall: Tensor) -> None:
        """rows: what `observe` returned; shortfall [..., out]: r of the same tokens, any float type."""
        r = shortfall.reshape(len(rows), -1)
        if self.cross is None or self.shortfalls is None:
            self.cross = torch.zeros(r.shape[1], rows.shape[1], device=rows.device)
            self.shortfalls = torch.zeros(r.shape[1], device=rows.device)
        if self.allow_nonfinite:
            r = torch.nan_to_num(r, nan=0.0, posinf=0.0, neginf=0.0)
        add_product(self.cross, r, rows)
        if self.centred:
            self.shortfalls += r.sum(0, dtype=torch.float32)

    def finish(self) -> Curvature:
        """The statistics; the observer is used up."""
        self._merge()
        count = self.hessian.count
        diagonal = self.hessian.lower.diagonal()
        bad = int((~torch.isfinite(diagonal)).sum())
        if bad:
            raise InputError(
                f"{self.where}: NaN or Inf activations in {bad} of {len(diagonal)} input channels; check the "
                "checkpoint, compute in float32 or bfloat16 (--dtype), or count them as zero with --allow-nonfinite"
            )
        mean = shortfall = None
        if self.centred:
            assert self.hessian.sums is not None
            mean = self.hessian.sums / count
            if self.cross is not None and self.shortfalls is not None:
                shortfall = self.shortfalls / count
                self.cross.addr_(self.shortfalls, mean, alpha=-1)
        return Curvature(self.hessian.finish(self.centred), count, mean, self.cross, shortfall)

    def _merge(self) -> None:
        """Sums over all processes, in place. What lies above the Hessian's diagonal is summed too, and never read."""
        self.hessian.count, self.nonfinite = distributed.totals(self.hessian.count, self.nonfinite)
        distributed.all_reduce_(self.hessian.lower, self.hessian.sums, self.cross, self.shortfalls)


def alignment_of(curvature: Curvature, damping: float, where: str) -> Tensor:
    """D A [in, in]: added to the identity, the least-squares estimate of the dense stream's x from the pruned one's.

    curvature: of x on the pruned stream, with the shortfall x_dense - x; D = Σ (x_dense - x) xᵀ, A the damped inverse
    of Σ x xᵀ. Raises InputError, naming `where`, as damped_inverse does.
    """
    assert curvature.cross is not None
    return curvature.cross @ damped_inverse(curvature.hessian, damping, where).inverse


def add_product(total: Tensor, r: Tensor, x: Tensor) -> None:
    """total [out, in] float32 += rᵀ x, r [tokens, out], x [tokens, in], in x's type on tensor cores."""
    if x.dtype == torch.float32 or x.device.type == "cpu":
        with exact_float32():
            total.addmm_(r.float().T, x.float())
    else:
        torch.addmm(total, r.to(x.dtype).T, x, out_dtype=torch.float32, out=total)
