"""The inverse of a damped Hessian, A = (H + λ·mean(diag H)·I)^-1.

The operator is `pyprune::spd_inverse`, plain PyTorch on every device; `spd_inverse_reference` says what it computes.
`damped_inverse` looks after dead channels and raises the damping where it has to.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import InputError
from .precision import exact_float32, tf32_products
from .split_tf32 import has_fast_tf32, split_factors, split_panel, subtract_product, triangle_updates

logger = logging.getLogger(__name__)

# Damping that fails is raised tenfold so many times; 0 is raised to FIRST_DAMPING.
RAISES = 3
FIRST_DAMPING = 1e-3


@dataclass(frozen=True)
class Blocking:
    """How a sweep is cut. swept: columns swept at once, the inner dimension of the products. updated: columns of the
    triangle updated at once, a multiple of `swept`; each product also computes half a square of so many columns
    above the diagonal for nothing. split: where TF32 is fast, the columns of a panel in one product of tensor cores,
    see split_panel; 0: products in float32. look_ahead: on a GPU, factor the next block beside the update.
    """

    swept: int
    updated: int
    split: int = 0
    look_ahead: bool = False


# The explicit inverse of a wide block's factor costs digits: against float64 at d = 1000 and 1800, over spectra of
# condition 1e2 to 1e5, 256 columns had 0.8 to 1.0 times the error of LAPACK's chain and 512 columns 0.9 to 1.6 times.
# On a CPU 128 are the fastest (d = 1500 to 3000, one core: 0.83 to 0.93 of LAPACK's time).
# On an H200, ms at d = 11008 and 28672 (the library's chain: 88.7 and 1244): as below 27.5 and 325.6; updated = 4096
# 27.6 and 343.5; 512 columns 29.3 and 332.4; float32 products 51.0 and 678.2. Errors as below 5.9e-6 and 8.9e-5 (the
# library's: 1.3e-5 and 1.6e-4), in float32 4.5e-6 and 3.7e-5.
BLOCKING = {"cpu": Blocking(128, 256), "cuda": Blocking(256, 2048, split=256, look_ahead=True)}
# Below, the host's share of a step rules, and where the library's own error is 3e-7 split products would add 1e-6.
SPLIT_FROM = 8192
# Smaller matrices are left to the library.
SWEPT_FROM = {"cpu": 1500, "cuda": 1024}


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
    check_tensor(h)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damped inverse: the damping is {damping}; it must be finite and not negative")
    diagonal = h.diagonal()
    dead = diagonal == 0
    if len(h) == 0:
        return DampedInverse(h.clone(), damping, dead)
    smallest, largest = torch.aminmax(h)
    live_count, trace, finite = torch.stack(
        [(~dead).sum().to(h.dtype), diagonal.sum(), (smallest.isfinite() & largest.isfinite()).to(h.dtype)]
    ).tolist()
    if not finite:
        raise InputError(f"{where}: NaN or Inf in the Hessian; check the checkpoint, or compute in a wider --dtype")
    if not live_count:
        logger.warning("%s: no channel was ever active; all of them count as dead", where)
        return DampedInverse(torch.eye(len(h), dtype=h.dtype, device=h.device), damping, dead)
    mean = trace / live_count
    for attempt in range(RAISES + 1):
        inverse, failed_block = spd_inverse(h, damping * mean)
        # An overflow inside is no failed block; |A_ij| ≤ √(A_ii A_jj), so the diagonal speaks for the rest.
        if ((failed_block == 0) & inverse.diagonal().isfinite().all()).item():
            return DampedInverse(inverse, damping, dead)
        del inverse  # before the next one is allocated
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
    """As spd_inverse, by the library's Cholesky factorisation and the inverse from it: 2⅓ d³ FLOP."""
    factor, info = torch.linalg.cholesky_ex(shifted(h, shift))
    return torch.cholesky_inverse(factor).contiguous(), (info != 0).to(torch.int32)


def shifted(h: Tensor, shift: float) -> Tensor:
    """H + shift·I as a new tensor; a channel with H_jj = 0 has 1 there and zeros beside it."""
    dead = h.diagonal() == 0
    a = torch.where(dead[:, None], 0, h)
    a.masked_fill_(dead, 0)
    a.diagonal().add_(shift).masked_fill_(dead, 1)
    return a


def check_tensor(h: Tensor) -> None:
    if h.dim() != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(f"inverse: h is {list(h.shape)}; it needs to be a square matrix")
    if h.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"inverse: h is {h.dtype}; use float32 or float64")


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
        device = h.device.type if h.device.type in BLOCKING else "cuda"
        if len(h) < SWEPT_FROM[device]:
            inverse, failed = spd_inverse_reference(h, shift)
            mirror_lower(inverse, BLOCKING[device].updated)  # cuSOLVER's two triangles differ in the last bits
            return inverse, failed
        a = shifted(h, shift)
        return a, sweep(a, BLOCKING[device])


@spd_inverse.register_fake
def _(h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    check_tensor(h)
    return h.new_empty(h.shape), h.new_empty((), dtype=torch.int32)


def sweep(a: Tensor, blocking: Blocking) -> Tensor:
    """Invert a [d, d] in place by symmetric Gauss-Jordan elimination in blocks of columns; info as spd_inverse.

    Of a only the lower triangle is read. Sweeping the columns K (Beaton 1964) takes

        A_KK to −A_KK^-1,  A_RK to A_RK A_KK^-1,  A_RR to A_RR − A_RK A_KK^-1 A_KR,

    R all other rows, swept or not; after all columns A is −A^-1. With A_KK = L Lᵀ, P = A_RK L^-T in the rows R and
    P = −L^-T in the rows K, that is: set A_RK and A_KK to zero and subtract P Pᵀ. The matrix stays symmetric, so a
    triangle will do: d³ FLOP, nearly all of them in products with an inner dimension of `blocking.swept`.

    The next A_KK is updated apart from the rest, so that it can be factored at the same time.

    The panel keeps its place, so that the views for the products are made once: on a GPU the host's part of a step
    counts. A last panel that is narrower is filled up with zeros.
    """
    d, block = len(a), min(blocking.swept, len(a))
    on_tensor_cores = blocking.split > 0 and d >= SPLIT_FROM and has_fast_tf32(a)
    look_ahead = blocking.look_ahead and a.is_cuda
    panel_buffer = a.new_empty(d, block)
    split_buffer = a.new_empty(-(-block // blocking.split), d, 4 * blocking.split) if on_tensor_cores else None
    factors = [(panel_buffer, panel_buffer)] if split_buffer is None else split_factors(block, split_buffer)
    updates = triangle_updates(a, factors, blocking.updated)
    identity = torch.eye(block, dtype=a.dtype, device=a.device)
    failures = []
    inverse_factor, failed = invert_factor(a[:block, :block], identity)
    for first in range(0, d, block):
        swept = slice(first, min(first + block, d))
        before, after = slice(0, first), slice(swept.stop, d)
        failures.append(failed)
        panel = panel_buffer[:, : len(inverse_factor)]  # P [d, b]
        transposed = inverse_factor.mT
        torch.mm(a[swept, before].mT, transposed, out=panel[before])
        torch.mm(a[after, swept], transposed, out=panel[after])
        torch.neg(transposed, out=panel[swept])
        if len(inverse_factor) < block:
            panel_buffer[:, len(inverse_factor) :].zero_()
        a[swept, : swept.stop].zero_()
        a[after, swept].zero_()
        if swept.stop < d:
            ahead = slice(swept.stop, min(swept.stop + block, d))
            rows = panel[ahead]
            upcoming = torch.addmm(a[ahead, ahead], rows, rows.mT, alpha=-1)
            inverse_factor, failed = (invert_factor_aside if look_ahead else invert_factor)(upcoming, identity)
        if split_buffer is not None:
            split_panel(panel_buffer, split_buffer)
        with nullcontext() if split_buffer is None else tf32_products():
            for update in updates:
                subtract_product(*update)
        if look_ahead:
            torch.cuda.current_stream(a.device).wait_stream(side_stream(a.device))
    a.neg_()
    mirror_lower(a, blocking.updated)
    failed_blocks = torch.stack(failures) != 0
    return torch.where(failed_blocks.any(), failed_blocks.int().argmax() + 1, 0).to(torch.int32)


def invert_factor(block: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 [b, b] of a block L Lᵀ, of which the lower triangle is read, and cholesky_ex's info."""
    factor, failed = torch.linalg.cholesky_ex(block)
    return torch.linalg.solve_triangular(factor, identity[: len(block), : len(block)], upper=False), failed


def invert_factor_aside(block: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """As invert_factor, on the side stream once the current one has come here; wait for it before using the result.

    No record_stream: memory that changes streams here is used again only after the next wait of one for the other.
    """
    side = side_stream(block.device)
    side.wait_stream(torch.cuda.current_stream(block.device))
    with torch.cuda.stream(side):
        return invert_factor(block, identity)


@cache  # cuBLAS keeps a workspace for every stream it has seen
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def mirror_lower(a: Tensor, block: int) -> None:
    """Copy the lower triangle of a [d, d] onto the upper one, in place."""
    for start in range(0, len(a), block):
        stop = min(start + block, len(a))
        lower = a[start:stop, start:stop].tril()
        a[start:stop, start:stop] = lower + lower.tril(-1).mT
        a[start:stop, stop:] = a[stop:, start:stop].mT
