"""The inverse of a damped Hessian, A = (H + λ·mean(diag H)·I)^-1.

The operator is `pyprune::spd_inverse`, plain PyTorch on every device; `spd_inverse_reference` says what it computes.
`damped_inverse` looks after dead channels and raises the damping where it has to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .checks import WIDE, check_kind, check_square
from .declaration import Operator
from .gauss_jordan import blocking_for, inverse_, mirror_lower, uses_gauss_jordan
from .precision import exact_float32

logger = logging.getLogger(__name__)

# Number of tenfold raises of a damping that fails; 0 is raised to FIRST_DAMPING.
RAISES = 3
FIRST_DAMPING = 1e-3


@dataclass(frozen=True)
class DampedInverse:
    """inverse: A [d, d], symmetric; damping: λ, the one that succeeded; dead: bool [d], H_jj == 0.

    A dead channel j has A_jj = 1 and zeros beside it, as if H_jj were 1 - λ·mean.
    """

    inverse: Tensor
    damping: float
    dead: Tensor


def damped_inverse(h: Tensor, damping: float = 0.01, where: str = "hessian") -> DampedInverse:
    """A = (H + λ·mean(diag H)·I)^-1, the mean over the channels that are not dead; H is left as it is.

    h: [d, d] float32 or float64, symmetric, both triangles filled. Where it is not positive definite, the damping λ
    is raised tenfold, at most RAISES times, each time with a warning. From SWEPT_FROM channels on, one buffer of h's
    size is allocated, and six panels of BLOCKING's columns. The host waits for the device once for the diagonal and
    once for each attempt.
    Raises InputError, naming `where`, for NaN or Inf and where no damping helps.
    """
    return DampedInverse(*solve_damped(h, damping, where, spd_inverse))


def solve_damped(
    h: Tensor, damping: float, where: str, solve: Callable[[Tensor, float], tuple[Tensor, Tensor]]
) -> tuple[Tensor, float, Tensor]:
    """(solve's result, the damping that succeeded, dead channels): damped_inverse's, for any solve(h, shift).

    solve gives a matrix whose overflow shows on its diagonal, and info, 0 where h + shift·I is positive definite.
    """
    check_tensor(h)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damped inverse: the damping is {damping}; it must be finite and not negative")
    diagonal = h.diagonal()
    dead = diagonal == 0
    if len(h) == 0:
        return h.clone(), damping, dead
    smallest, largest = torch.aminmax(h)
    live_count, trace, finite = torch.stack(
        [(~dead).sum().to(h.dtype), diagonal.sum(), (smallest.isfinite() & largest.isfinite()).to(h.dtype)]
    ).tolist()
    if not finite:
        raise InputError(f"{where}: NaN or Inf in the Hessian; check the checkpoint, or compute in a wider --dtype")
    if not live_count:
        logger.warning("%s: no channel was ever active; all of them count as dead", where)
        return torch.eye(len(h), dtype=h.dtype, device=h.device), damping, dead
    mean = trace / live_count
    for attempt in range(RAISES + 1):
        result, failed_block = solve(h, damping * mean)
        # An overflow inside is no failed block; |A_ij| ≤ √(A_ii A_jj), so the diagonal speaks for the rest.
        if ((failed_block == 0) & result.diagonal().isfinite().all()).item():
            return result, damping, dead
        del result  # before the next one is allocated
        if attempt < RAISES:
            raised = 10 * damping or FIRST_DAMPING
            logger.warning(
                "%s: the Hessian with damping %g is not positive definite; trying %g", where, damping, raised
            )
            damping = raised
    raise InputError(
        f"{where}: the Hessian is not positive definite even with damping {damping:g}; use more calibration tokens "
        "or a larger --damping, and check the layer's inputs"
    )


def spd_inverse_reference(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Reference of spd_inverse: the library's Cholesky factorisation and the inverse from it, 2⅓ d³ FLOP."""
    factor, info = torch.linalg.cholesky_ex(shifted(h, shift))
    failed = info != 0
    # A failed factorisation may leave a 0 on the diagonal, for which LAPACK's inversion raises.
    factor.diagonal().masked_fill_(failed, 1)
    return torch.cholesky_inverse(factor).contiguous(), failed.to(torch.int32)


def shifted(h: Tensor, shift: float) -> Tensor:
    """H + shift·I as a new tensor; a channel with H_jj = 0 has 1 there and zeros beside it."""
    dead = h.diagonal() == 0
    a = torch.where(dead[:, None], 0, h)
    a.masked_fill_(dead, 0)
    a.diagonal().add_(shift).masked_fill_(dead, 1)
    return a


def check_tensor(h: Tensor) -> None:
    check_square("inverse", "h", h)
    check_kind("inverse", "h", h, WIDE)


@torch.library.custom_op(
    "pyprune::spd_inverse", mutates_args=(), schema="(Tensor h, float shift) -> (Tensor inverse, Tensor info)"
)
def spd_inverse(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """((H + shift·I)^-1, info) for H [d, d] float32 or float64, symmetric, both triangles filled.

    A channel with H_jj = 0 is cut off: its row and column of the inverse are those of the identity. info: int32
    scalar on h's device; 0, or 1 + the index of the first block of columns that is not positive definite, and then
    the inverse is worth nothing. Nothing waits for the device. Whether products use TF32 is decided here, not by
    the caller's setting.
    Raises ValueError for what is no square matrix of these types.
    """
    check_tensor(h)
    with exact_float32():
        blocking = blocking_for(h)
        if not uses_gauss_jordan(h):
            inverse, failed = spd_inverse_reference(h, shift)
            mirror_lower(inverse, blocking.updated)  # cuSOLVER's two triangles differ in the last bits
            return inverse, failed
        a = shifted(h, shift)
        return a, inverse_(a, blocking)


@spd_inverse.register_fake
def _(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    check_tensor(h)
    return h.new_empty(h.shape), h.new_empty((), dtype=torch.int32)


# Plain PyTorch on every device.
SPD_INVERSE: Operator[Any] = Operator(
    "spd_inverse", versions={"DampedInverse": 1, "damped_inverse": 1, "spd_inverse": 1}
)
