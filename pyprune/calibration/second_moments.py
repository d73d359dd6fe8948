"""Second moments of an output projection's inputs, and of how they go with what the residual stream is short of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..forward.token_weights import TokenWeights
from ..ops import Hessian, damped_inverse
from ..ops.precision import exact_float32
from ..runtime import distributed


@dataclass
class SecondMoments:
    """Statistics of one output projection, its input x [in] over `count` tokens; float32 on its device.

    hessian: [in, in] Σ x xᵀ; centred, Σ (x − m)(x − m)ᵀ. mean: m [in], if centred. cross: [out, in] Σ r xᵀ, or
    Σ (r − r̄)(x − m)ᵀ, r the error of the residual stream right after the sublayer; stream error: r̄ [out]. The last
    two where a dense stream is carried.
    """

    hessian: Tensor
    count: int
    mean: Tensor | None = None
    cross: Tensor | None = None
    stream_error: Tensor | None = None

    def take_hessian(self) -> Tensor:
        """The Hessian, handed over for good, so that its memory is free once the caller is through with it."""
        hessian, self.hessian = self.hessian, self.hessian.new_empty(0, 0)
        return hessian

    def take_cross(self) -> Tensor:
        """`cross`, handed over for good; it has to be there."""
        assert self.cross is not None
        cross, self.cross = self.cross, None
        return cross


class HessianObserver:
    """Accumulates the second moments of one output projection while its inputs pass by.

    `where` names layer and output projection in errors. `centred`: about the means. With `allow_nonfinite`, NaN and Inf
    count as zero and are tallied in `nonfinite`; otherwise `result` raises InputError if any came. In several processes
    each sees its own inputs, and `result` gives all of them the statistics, and `nonfinite`, of all inputs.
    """

    def __init__(self, channels: int, device: torch.device, where: str, centred: bool, allow_nonfinite: bool) -> None:
        self.where, self.centred, self.allow_nonfinite = where, centred, allow_nonfinite
        self.hessian = Hessian.zeros(channels, device, sums=centred)
        self.cross: Tensor | None = None
        self.stream_errors: Tensor | None = None
        self.nonfinite = 0

    def observe(self, x: Tensor, weights: TokenWeights | None = None) -> Tensor:
        """x: [..., in], the output projection's input. Returns it as rows [tokens, in], as it was counted.

        weights: of the tokens, where a norm follows the projection; all inputs have them, or none.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self.allow_nonfinite:
            bad = ~torch.isfinite(rows)
            self.nonfinite += int(bad.sum())
            rows = rows.masked_fill(bad, 0)
        self.hessian.update(rows, None if weights is None else weights.weight)
        return rows

    def observe_stream_error(self, rows: Tensor, stream_error: Tensor, weights: TokenWeights | None = None) -> None:
        """rows: what `observe` returned; stream error [..., out]: r of the same tokens, any float type."""
        r = stream_error.reshape(len(rows), -1)
        if weights is not None:  # Σ w² (rms(y) r) xᵀ
            r = r * (weights.weight * weights.residual)[:, None].to(r.dtype)
        if self.cross is None or self.stream_errors is None:
            self.cross = torch.zeros(r.shape[1], rows.shape[1], device=rows.device)
            self.stream_errors = torch.zeros(r.shape[1], device=rows.device)
        if self.allow_nonfinite:
            r = torch.nan_to_num(r, nan=0.0, posinf=0.0, neginf=0.0)
        add_product(self.cross, r, rows)
        if self.centred:
            self.stream_errors += r.sum(0, dtype=torch.float32)

    def result(self) -> SecondMoments:
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
        mean = stream_error = None
        if self.centred:
            assert self.hessian.sums is not None
            mean = self.hessian.mean()
            if self.cross is not None and self.stream_errors is not None:
                total = count if self.hessian.total is None else self.hessian.total
                stream_error = (self.stream_errors / total).float()
                self.cross.addr_(self.stream_errors, mean, alpha=-1)
        return SecondMoments(self.hessian.finish(self.centred), count, mean, self.cross, stream_error)

    def _merge(self) -> None:
        """Sums over all processes, in place. What lies above the Hessian's diagonal is summed too, and never read."""
        self.hessian.count, self.nonfinite = distributed.all_reduce_sum(self.hessian.count, self.nonfinite)
        distributed.all_reduce_(
            self.hessian.lower, self.hessian.sums, self.hessian.total, self.cross, self.stream_errors
        )


def alignment_of(second_moments: SecondMoments, damping: float, where: str) -> Tensor:
    """D A [in, in]: added to the identity, the least-squares estimate of the dense stream's x from the pruned one's.

    second moments: of x on the pruned stream, with the stream error x_dense - x; D = Σ (x_dense - x) xᵀ, A the damped
    inverse of Σ x xᵀ. Raises InputError, naming `where`, as damped_inverse does.
    """
    assert second_moments.cross is not None
    return second_moments.cross @ damped_inverse(second_moments.hessian, damping, where).inverse


def add_product(total: Tensor, r: Tensor, x: Tensor) -> None:
    """total [out, in] float32 += rᵀ x, r [tokens, out], x [tokens, in], in x's type on tensor cores."""
    if x.dtype == torch.float32 or x.device.type == "cpu":
        with exact_float32():
            total.addmm_(r.float().T, x.float())
    else:
        torch.addmm(total, r.to(x.dtype).T, x, out_dtype=torch.float32, out=total)
