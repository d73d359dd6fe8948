"""The factor that column-by-column methods walk: U upper triangular, Uᵀ U = (H + λ·mean(diag H)·I)^-1.

GPTQ (arXiv 2210.17323, §3.3 step 3) and SparseGPT (arXiv 2301.00774, §3.4) take it by three factorisations, cholesky,
cholesky_inverse and cholesky once more. With J the reversal of rows and columns, J H J = L Lᵀ gives U = J L^-1 J at
once: ⅔ d³ FLOP, and no second factorisation of a matrix that has been inverted already.

The operator is `pyprune::spd_inverse_factor`, plain PyTorch on every device; `spd_inverse_factor_reference` says what
it computes. `inverse_factor` looks after dead channels and raises the damping where it has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .declaration import Operator
from .gauss_jordan import blocking_for, inverse_factor_, uses_gauss_jordan
from .precision import exact_float32
from .spd_inverse import check_tensor, shifted, solve_damped

# Elements that are reversed at a time: 64 MiB of temporary memory in float32.
REVERSED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class InverseFactor:
    """factor: U [d, d], upper triangular; damping: λ, the one that succeeded; dead: bool [d], H_jj == 0.

    A dead channel j has U_jj = 1 and zeros beside it, as if H_jj were 1 - λ·mean.
    """

    factor: Tensor
    damping: float
    dead: Tensor


def inverse_factor(h: Tensor, damping: float = 0.01, where: str = "hessian") -> InverseFactor:
    """U, Uᵀ U = (H + λ·mean(diag H)·I)^-1, the mean over the channels that are not dead; H is left as it is.

    h: [d, d] float32 or float64, symmetric, both triangles filled. Damping, memory, waiting and errors as in
    damped_inverse.
    """
    return InverseFactor(*solve_damped(h, damping, where, spd_inverse_factor))


def spd_inverse_factor_reference(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Reference of spd_inverse_factor: the library's Cholesky factorisation and a triangular solve, 1⅓ d³ FLOP."""
    factor, info = torch.linalg.cholesky_ex(shifted(h, shift).flip(0, 1))
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.flip(0, 1).contiguous(), (info != 0).to(torch.int32)


@torch.library.custom_op(
    "pyprune::spd_inverse_factor", mutates_args=(), schema="(Tensor h, float shift) -> (Tensor factor, Tensor info)"
)
def spd_inverse_factor(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """(U, info) for H [d, d] float32 or float64, symmetric, both triangles filled: Uᵀ U = (H + shift·I)^-1.

    U is upper triangular with a positive diagonal. A channel with H_jj = 0 is cut off: its row and column of U are
    those of the identity. info: int32 scalar on h's device; 0, or another number where H + shift·I is not positive
    definite, and then the factor is worth nothing. Nothing waits for the device. Whether products use TF32 is decided
    here, not by the caller's setting.
    Raises ValueError for what is no square matrix of these types.
    """
    check_tensor(h)
    with exact_float32():
        if not uses_gauss_jordan(h, factor=True):
            return spd_inverse_factor_reference(h, shift)
        a = shifted(h, shift)
        reverse_(a)
        info = inverse_factor_(a, blocking_for(h))
        reverse_(a)
        return a, info


@spd_inverse_factor.register_fake
def _(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    check_tensor(h)
    return h.new_empty(h.shape), h.new_empty((), dtype=torch.int32)


def reverse_(a: Tensor) -> None:
    """The rows and the columns of a contiguous a [d, d] in reverse order, in place."""
    flat = a.view(-1)
    half = len(flat) // 2
    for start in range(0, half, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, half)
        head, tail = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        reversed_head = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(reversed_head)


# Plain PyTorch on every device.
INVERSE_FACTOR: Operator[Any] = Operator(
    "spd_inverse_factor", versions={"InverseFactor": 1, "inverse_factor": 1, "spd_inverse_factor": 1}
)
