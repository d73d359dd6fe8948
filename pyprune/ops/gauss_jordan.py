"""Symmetric Gauss-Jordan elimination in blocks of columns: a Hessian's inverse, or the inverse of its Cholesky factor.

Plain PyTorch on every device; nearly all of its work is in large matrix products.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .precision import tf32_products
from .split_tf32 import has_fast_tf32, split_factors, split_panel, subtract_product, triangle_updates


@dataclass(frozen=True)
class Blocking:
    """Block sizes of a sweep.

    swept: columns swept at once, the inner dimension of the products. updated: columns of the triangle updated at once,
    a multiple of `swept`; each product also computes half a square of that many columns above the diagonal in vain.
    split: where TF32 is fast, the columns of a panel in one product of tensor cores (split_panel); 0: products in
    float32. look_ahead: on a GPU, factor the next block beside the update.
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
# For the factor the library has a triangular solve, which is quicker to launch. On an H100, ms by the sweep and by the
# library: 6.8 and 5.4 at 4096, 8.0 and 9.5 at 5120, 29.6 and 58.8 at 11008.
FACTOR_SWEPT_FROM = {"cpu": 1500, "cuda": 5120}


def blocking_for(h: Tensor) -> Blocking:
    return BLOCKING.get(h.device.type, BLOCKING["cuda"])


def uses_gauss_jordan(h: Tensor, factor: bool = False) -> bool:
    """Return whether h [d, d] is large enough for a sweep to its inverse, or to its factor's."""
    sizes = FACTOR_SWEPT_FROM if factor else SWEPT_FROM
    return len(h) >= sizes.get(h.device.type, sizes["cuda"])


def eliminate_panels(a: Tensor, blocking: Blocking, factor: bool = False) -> Tensor:
    """a [d, d] to −A^-1 in place, or with `factor` A = L Lᵀ to L^-1, by elimination in blocks of columns.

    Of a only the lower triangle is read, and only there the result stands. Returns info as spd_inverse does.
    Sweeping the columns K (symmetric Gauss-Jordan, Beaton 1964) takes

        A_KK to −A_KK^-1,  A_RK to A_RK A_KK^-1,  A_RR to A_RR − A_RK A_KK^-1 A_KR,

    R all other rows, swept or not; after all columns A is −A^-1. With A_KK = L Lᵀ, P = A_RK L^-T in the rows R and
    P = −L^-T in the rows K, that is: set A_RK and A_KK to zero and subtract P Pᵀ. The matrix stays symmetric, so a
    triangle will do: d³ FLOP, nearly all of them in products with an inner dimension of `blocking.swept`.

    L^-1 is made of the same panels. Of its rows K, L_KK^-1 is P in the rows K but for the sign, and the columns before
    are Pᵀ in the rows before K; rows that are swept change no more. So P Pᵀ is subtracted from the rows after K only,
    and what the rows K had become is Pᵀ: ⅔ d³ FLOP.

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
        columns = slice(first, min(first + block, d))
        before, after = slice(0, first), slice(columns.stop, d)
        failures.append(failed)
        panel = panel_buffer[:, : len(inverse_factor)]  # P [d, b]
        transposed = inverse_factor.mT
        torch.mm(a[columns, before].mT, transposed, out=panel[before])
        torch.mm(a[after, columns], transposed, out=panel[after])
        if factor:
            panel[columns] = transposed
        else:
            torch.neg(transposed, out=panel[columns])
        if len(inverse_factor) < block:
            panel_buffer[:, len(inverse_factor) :].zero_()
        if factor:
            a[columns, : columns.stop] = panel[: columns.stop].mT
            updates = triangle_updates(a, factors, blocking.updated, columns.stop)
        else:
            a[columns, : columns.stop].zero_()
        a[after, columns].zero_()
        if columns.stop < d:
            ahead = slice(columns.stop, min(columns.stop + block, d))
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
    failed_blocks = torch.stack(failures) != 0
    return torch.where(failed_blocks.any(), failed_blocks.int().argmax() + 1, 0).to(torch.int32)


def inverse_(a: Tensor, blocking: Blocking) -> Tensor:
    """a [d, d], of which the lower triangle is read, to A^-1 in place, both triangles; info as spd_inverse."""
    info = eliminate_panels(a, blocking)
    mirror_lower(a.neg_(), blocking.updated)
    return info


def inverse_factor_(a: Tensor, blocking: Blocking) -> Tensor:
    """A = L Lᵀ [d, d], of which the lower triangle is read, to L^-1 in place; info as spd_inverse."""
    info = eliminate_panels(a, blocking, factor=True)
    a.tril_()
    return info


def invert_factor(block: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 [b, b] of a block L Lᵀ, of which the lower triangle is read, and cholesky_ex's info."""
    factor, failed = torch.linalg.cholesky_ex(block)
    return torch.linalg.solve_triangular(factor, identity[: len(block), : len(block)], upper=False), failed


def invert_factor_aside(block: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Run invert_factor on the side stream, after the current one's work; wait for it before using the result.

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
