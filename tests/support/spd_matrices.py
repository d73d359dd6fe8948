"""Symmetric positive definite matrices of several spectra, and the error of what is made of them."""

import torch
from torch import Tensor

from pyprune.ops.gauss_jordan import Blocking

FP32_UNIT = 2.0**-24
# For small matrices: several blocks of few columns, on a GPU with look-ahead.
SMALL_BLOCKING = Blocking(16, 32, look_ahead=True)


def symmetric(h: Tensor) -> Tensor:
    return h.tril() + h.tril(-1).T


def hessian(channels: int, rows: int, seed: int = 0) -> Tensor:
    """XᵀX of correlated inputs whose scales lie within a decade and a half, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    x += x @ torch.randn(channels, channels, generator=generator) / (2 * channels**0.5)
    x *= 10 ** (1.5 * torch.rand(channels, generator=generator))
    return symmetric(x.T @ x)


def with_condition(channels: int, condition: float) -> Tensor:
    """Eigenvalues spaced evenly in the logarithm from 1 to 1 / condition, float32 on the CPU."""
    generator = torch.Generator().manual_seed(channels)
    basis = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))[0]
    exponents = torch.linspace(0, 1, channels, dtype=torch.float64)
    return symmetric(((basis * condition**-exponents) @ basis.T).float())


FAMILIES = {
    "correlated": lambda d: hessian(d, 4 * d),
    "rank d/8": lambda d: hessian(d, max(1, d // 8)),
    "condition 100": lambda d: with_condition(d, 1e2),
    "condition 1e5": lambda d: with_condition(d, 1e5),
    "diagonal": lambda d: torch.diag(torch.logspace(-2, 2, d)),
    "tridiagonal": lambda d: 2.1 * torch.eye(d) - torch.diag(torch.ones(d - 1), 1) - torch.diag(torch.ones(d - 1), -1),
}


def relative_error(inverse: Tensor, exact: Tensor) -> float:
    return ((inverse.double() - exact).norm() / exact.norm()).item()
