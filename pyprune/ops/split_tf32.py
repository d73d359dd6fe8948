"""Products of float32 matrices on tensor cores: three products in TF32 of the high and low parts of each factor."""

from typing import Any

import torch
from torch import Tensor

from .checks import WIDE, check_alike, check_apart, check_kind, check_matrix
from .declaration import Operator
from .precision import exact_float32, tf32_products

# Compute capabilities whose TF32 has several times the rate of float32; elsewhere at most twice, and three products
# in place of one do not pay.
FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}

# Columns of a long inner dimension that tensor cores sum before float32 units add the sums up.
COLUMNS = 256


def subtract_product(c: Tensor, left: Tensor, right: Tensor) -> None:
    """c −= left right, in place."""
    c.addmm_(left, right, alpha=-1)


def triangle_updates(
    matrix: Tensor, factors: list[tuple[Tensor, Tensor]], width: int, first: int = 0
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Arguments of subtract_product, views all, that take Σ left rightᵀ from the lower triangle of matrix [d, d].

    Of that the rows from `first` on.

    factors: pairs of [d, n] whose sum of products is symmetric. By block columns of `width`, so that little above the
    diagonal is computed and no more than that is overwritten.
    """
    return [
        (matrix[top:, start : start + width], left[top:], right[start : start + width].mT)
        for start in range(0, len(matrix), width)
        if (top := max(start, first)) < len(matrix)
        for left, right in factors
    ]


def has_fast_tf32(a: Tensor) -> bool:
    return (
        a.is_cuda
        and a.dtype == torch.float32
        and torch.version.hip is None
        and torch.cuda.get_device_capability(a.device) in FAST_TF32
    )


def split_factors(block: int, buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs (left, right), views of split_panel's buffer, for a panel of `block` columns."""
    columns = buffer.shape[2] // 4
    widths = [min(columns, block - start) for start in range(0, block, columns)]
    return [(rows[:, : 3 * width], rows[:, width : 4 * width]) for rows, width in zip(buffer, widths, strict=True)]


def split_panel(panel: Tensor, buffer: Tensor) -> None:
    """Fill `buffer` so that TF32 products of split_factors' pairs, left rightᵀ over all pairs, are P Pᵀ as in float32.

    panel: P [d, b] float32. buffer: [⌈b / columns⌉, d, 4·columns], overwritten.
    P = hi + lo, where hi is P rounded to TF32's 10 bits and lo the exact rest, ≤ 2^-11 |P|, of which TF32 drops at
    most the last bit. A row of the buffer is [hi lo hi hi]: its first three quarters times its last three are
    hi·loᵀ + lo·hiᵀ + hi·hiᵀ, all but lo·loᵀ ≤ 2^-22.

    Tensor cores truncate each partial sum of 8 columns, so errors add up in one direction along the inner dimension:
    hence the small terms come first, while the sum is small, and after `columns` of P float32 units add the sum to A,
    rounding to nearest. Emulated on a CPU with truncation (swept 256, d = 1024, five spectra), `columns` of 256, 128
    and 64 had 0.5 to 5.2, 0.5 to 2.8 and 0.6 to 1.7 times the error of the sweep in float32; hi·hiᵀ first, 3 to 18.
    """
    for part, rows in zip(panel.split(buffer.shape[2] // 4, dim=1), buffer, strict=True):
        width = part.shape[1]
        quarters = rows[:, : 4 * width].unflatten(1, (4, width))
        high_and_low(part, quarters[:, 0], quarters[:, 1])
        quarters[:, 2:] = quarters[:, :1]


def high_and_low(x: Tensor, high: Tensor, low: Tensor) -> None:
    """high ← x rounded to TF32's 10 bits, low ← the exact rest; float32 of one shape."""
    bits = (x.view(torch.int32) + 0x1000).bitwise_and_(-0x2000)  # half a unit of the 10th bit; 13 bits off
    high.copy_(bits.view(torch.float32))
    torch.sub(x, high, out=low)


def split_gram(weight: Tensor, width: int) -> Tensor:
    """WᵀW [in, in] of weight [out, in] float32 by block columns of `width`; above the diagonal anything may stand.

    As good as exact float32, on tensor cores, COLUMNS rows of W at a time (see split_panel).
    """
    channels = weight.shape[1]
    gram = weight.new_zeros(channels, channels)
    buffer = weight.new_empty(1, channels, 4 * COLUMNS)
    with tf32_products():
        for rows in weight.split(COLUMNS):
            split_panel(rows.mT, buffer)
            for update in triangle_updates(gram, split_factors(len(rows), buffer), width):
                subtract_product(*update)
    return gram.neg_()


def add_split_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """total [m, n] += alpha · left rightᵀ, left [m, k], right [n, k], of one type; float32 is as good as exact float32.

    On tensor cores where TF32 is fast, COLUMNS of k at a time (see split_panel). Raises ValueError for arguments that
    do not fit each other.
    """
    check_product(total, left, right)
    add_product(total, left, right, alpha)


def check_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    operator = "add_split_product"
    for name, x in (("total", total), ("left", left), ("right", right)):
        check_kind(operator, name, x, WIDE)
        check_matrix(operator, name, x)
    check_alike(operator, "left", left, "total", total)
    check_alike(operator, "right", right, "total", total)
    for name, x, rows in (("left", left, total.shape[0]), ("right", right, total.shape[1])):
        if x.shape[0] != rows:
            raise ValueError(
                f"{operator}: {name} is {list(x.shape)}; total {list(total.shape)} needs {rows} rows of it"
            )
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"{operator}: left is {list(left.shape)} and right {list(right.shape)}; rows need one length")
    check_apart(operator, {"total": total}, {"left": left, "right": right})


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """add_split_product of arguments that fit."""
    if not has_fast_tf32(left):
        with exact_float32():
            total.addmm_(left, right.mT, alpha=alpha)
        return
    buffers = [side.new_empty(1, len(side), 4 * COLUMNS) for side in (left, right)]
    for start in range(0, left.shape[1], COLUMNS):
        parts = [side[:, start : start + COLUMNS] for side in (left, right)]
        for part, buffer in zip(parts, buffers, strict=True):
            split_panel(part, buffer)
        ((first, _),), ((_, second),) = (split_factors(parts[0].shape[1], buffer) for buffer in buffers)
        with tf32_products():
            total.addmm_(first, second.mT, alpha=alpha)


# Library products on every device.
ADD_SPLIT_PRODUCT: Operator[Any] = Operator("add_split_product", versions={"add_split_product": 1})
