"""The inverse of a damped Hessian, and the factor of the inverse that column-by-column methods walk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops import spd_inverse_factor
from ...ops.precision import exact_float32
from ...ops.spd_inverse import spd_inverse
from ..case import FULL, OTHER, SWEEP, Candidate, Case, Errors, Problem, Scale, normal
from ..models import Model
from ..rates import Work

PROBES = 16  # random vectors
PROBE_ROWS = 2048  # rows of a matrix that are converted to float64 at a time
# Beside twice the library's error: 4 times float32's unit, for matrices where the library's own error is a rounding.
ROUNDINGS = 2.0**-22


def damped_hessian(channels: int, device: torch.device) -> Tensor:
    """XᵀX of 2·channels correlated tokens, damped by 1 %; made in pieces, since X is larger than the result."""
    generator = torch.Generator(device).manual_seed(0)
    scale = 10 ** torch.rand(channels, device=device, generator=generator)
    common = torch.randn(64, channels, device=device, generator=generator)
    h = torch.zeros(channels, channels, device=device)
    for _ in range(8):
        rows = channels // 4
        x = torch.randn(rows, channels, device=device, generator=generator)
        x += torch.randn(rows, 64, device=device, generator=generator) @ common / 8
        x *= scale
        h.addmm_(x.T, x)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    for first in range(0, channels, PROBE_ROWS):  # symmetric to the bit
        rows_of = slice(first, first + PROBE_ROWS)
        h[rows_of, first:] = h[first:, rows_of].mT.clone()
    return h


def product(a: Tensor, v: Tensor) -> Tensor:
    """A V in float64, some rows at a time."""
    return torch.cat([rows.double() @ v for rows in a.split(PROBE_ROWS)])


def probe(channels: int, device: torch.device) -> Tensor:
    return normal(device, torch.float64, channels, PROBES, seed=1)


def error_on(name: str, v: Tensor, exact: Tensor) -> Callable[[Tensor], Errors]:
    """‖(A − exact) V‖ / ‖exact V‖, which estimates the relative Frobenius error; exact: its image of V."""
    return lambda a: {name: ((product(a, v) - exact).norm() / exact.norm()).item()}


def twice(plain: Errors) -> Errors:
    return {name: 2 * error + ROUNDINGS for name, error in plain.items()}


def exactly(run: Callable[[Tensor], Tensor], h: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with exact_float32():
            return run(h)

    return call


def by_cholesky_inverse(h: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


def by_cholesky_solve(h: Tensor) -> Tensor:
    return torch.cholesky_solve(torch.eye(len(h), device=h.device), torch.linalg.cholesky(h))


def inverse_problem(channels: int, device: torch.device) -> Problem:
    h = damped_hessian(channels, device)
    v = probe(channels, device)
    exact = torch.cholesky_solve(v, torch.linalg.cholesky(h.double()))
    accuracy_reference = "cholesky, cholesky_inverse"
    return Problem(
        Candidate("own", lambda: spd_inverse(h, 0.0)[0]),
        (
            Candidate(
                accuracy_reference,
                exactly(by_cholesky_inverse, h),
                kind=OTHER,
                source="GPTQ and SlimGPT, arXiv 2412.18110",
            ),
            Candidate("cholesky, cholesky_solve of the identity", exactly(by_cholesky_solve, h)),
            Candidate("linalg.inv", exactly(torch.linalg.inv, h)),
        ),
        error_on("A", v, exact),
        accuracy_reference,
        twice,
    )


def by_three_factorisations(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(by_cholesky_inverse(h), upper=True)


def by_reversal(h: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(h.flip(0, 1))
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1)


def factor_problem(channels: int, device: torch.device) -> Problem:
    h = damped_hessian(channels, device)
    v = probe(channels, device)
    reversed_factor = torch.linalg.cholesky(h.double().flip(0, 1))
    exact = torch.linalg.solve_triangular(reversed_factor, v.flip(0), upper=False).flip(0)
    accuracy_reference = "cholesky, cholesky_inverse, cholesky(upper)"
    return Problem(
        Candidate("own", lambda: spd_inverse_factor(h, 0.0)[0]),
        (
            Candidate(
                accuracy_reference,
                exactly(by_three_factorisations, h),
                kind=OTHER,
                source="GPTQ and SparseGPT, arXiv 2210.17323, 2301.00774",
            ),
            Candidate("cholesky and solve_triangular, reversed", exactly(by_reversal, h)),
        ),
        error_on("U", v, exact),
        accuracy_reference,
        twice,
    )


def inverse_case(where: str, channels: int) -> Case:
    """d³/3 for the factorisation, ⅔ d³ for the inverse from it; a triangle is read, the whole is written."""
    work = Work(6 * channels * channels, channels**3)
    size, make = f"{channels}x{channels}", partial(inverse_problem, channels)
    return Case("spd_inverse", where, size, torch.float32, work, make)


def factor_case(where: str, channels: int) -> Case:
    """d³/3 for the factorisation, d³/3 for its triangular inverse; of both matrices a triangle."""
    work = Work(4 * channels * channels, 2 * channels**3 // 3)
    size, make = f"{channels}x{channels}", partial(factor_problem, channels)
    return Case("spd_inverse_factor", where, size, torch.float32, work, make)


def cases(model: Model, scale: Scale) -> Iterator[Case]:
    for place, channels in model.output_projs().items():
        yield inverse_case(f"{model.name}-{place}", channels)


def factor_cases(model: Model, scale: Scale) -> Iterator[Case]:
    for place, channels in model.output_projs().items():
        yield factor_case(f"{model.name}-{place}", channels)


def swept_sizes(scale: Scale) -> tuple[int, ...]:
    """List sizes of a sweep; on a GPU both sides of 1024 channels, where Gauss-Jordan elimination begins."""
    return (512, 1024, 2048, 16384) if scale is FULL else (256, 512)


def sweep(scale: Scale) -> Iterator[Case]:
    return (inverse_case(SWEEP, channels) for channels in swept_sizes(scale))


def factor_sweep(scale: Scale) -> Iterator[Case]:
    return (factor_case(SWEEP, channels) for channels in swept_sizes(scale))
