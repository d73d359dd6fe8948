"""Weights of rows: square roots w of the weights w² that statistics over rows sum with, and their sum Σ w².

Roots, because a row times w enters every product twice; powers of two, because 16-bit values times them are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import DOUBLE, SINGLE, check_device, check_kind


def check_weights(operator: str, weights: Tensor, x: Tensor) -> None:
    """ValueError unless weights is float32 [rows], one for each row of x [..., channels], on its device."""
    check_kind(operator, "weights", weights, SINGLE)
    rows = x.shape[:-1].numel()
    if weights.shape != (rows,):
        raise ValueError(f"{operator}: weights is {list(weights.shape)}; x {list(x.shape)} needs one a row, [{rows}]")
    check_device(operator, "weights", weights, "x", x)


def check_total(operator: str, total: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless total is a float64 scalar on the device of `other`."""
    check_kind(operator, "total", total, DOUBLE)
    if total.dim() != 0:
        raise ValueError(f"{operator}: total is {list(total.shape)}; it needs to be a scalar, Σ w²")
    check_device(operator, "total", total, other_name, other)


def check_unmixed(operator: str, count: int, total: Tensor | None, weighted: bool) -> None:
    """ValueError where weighted rows would join a state of `count` rows without weights, or the reverse."""
    if count > 0 and weighted != (total is not None):
        before, after = ("no weights", "weights") if weighted else ("weights", "no weights")
        raise ValueError(
            f"{operator}: the state has rows with {before}, and these have {after}; give weights to all rows or to none"
        )


def total_before(operator: str, count: int, total: Tensor | None, x: Tensor, weights: Tensor | None) -> Tensor | None:
    """Σ w² of a state before the rows of x join it, float64 scalar; None where rows have no weights.

    Raises ValueError where weights are mixed; an x without rows joins anything.
    """
    if x.shape[:-1].numel() > 0:
        check_unmixed(operator, count, total, weights is not None)
    if weights is None:
        return None
    return torch.zeros((), dtype=torch.float64, device=x.device) if total is None else total


def sum_of_weights(weights: Tensor) -> Tensor:
    """Σ w² of weights [rows], float64 scalar on their device."""
    return weights.detach().square().sum(dtype=torch.float64)


def share(part: Tensor, total: Tensor) -> Tensor:
    """part / total, and 0 where total is 0: nothing has a weight."""
    return torch.where(total == 0, 0, part / total)


def divisor_of(weights: Tensor) -> Tensor:
    """Of weights [rows] the least power of two that is not below any |w|, float32 scalar on their device; of 0, 1.

    float16 has too few exponents for w² x: kernels divide w by it, and multiply their sums by its square.
    """
    mantissa, exponent = torch.frexp(weights.abs().amax())  # mantissa 0.5 to 1
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return ((exponent + 127) << 23).view(torch.float32)  # the bits of 2^exponent
