"""The errors of removing single attention units, against the library's batched factorisation and solves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops import grouped_cholesky_errors, grouped_cholesky_errors_reference
from ...ops.grouped_cholesky import diagonal_blocks
from ...ops.precision import exact_float32
from ..case import FULL, OTHER, SWEEP, Candidate, Case, Problem, Scale, normal
from ..models import Model
from ..rates import Work

ROUNDINGS = 4 * 2.0**-24
ACCURACY_REFERENCE = "cholesky, two solves with G"


class Units:
    """A = H^-1 of correlated inputs, H damped by 1 %, and W [units, width, out]; all on one device, float32."""

    def __init__(self, units: int, width: int, outputs: int, device: torch.device) -> None:
        self.width = width
        channels = units * width
        mix = normal(device, torch.float32, channels, channels) / channels**0.5
        x = normal(device, torch.float32, 2 * channels, channels, seed=1)
        w = normal(device, torch.float32, outputs, channels, seed=2)
        with exact_float32():
            x += x @ mix
            h = x.T @ x
            h.diagonal().add_(0.01 * h.diagonal().mean())
            self.a = torch.cholesky_inverse(torch.linalg.cholesky(h)).mT.contiguous()
            self.g = w.T @ w
        self.w = w.T.reshape(units, width, outputs).contiguous()

    def operator(self) -> Tensor:
        return grouped_cholesky_errors(self.a, self.g, self.width)

    def factors(self) -> Tensor:
        return torch.linalg.cholesky_ex(diagonal_blocks(self.a, self.width))[0]  # [units, w, w]

    def solve_weights(self) -> Tensor:
        """‖L^-1 Wᵀ‖² for every unit."""
        return torch.linalg.solve_triangular(self.factors(), self.w, upper=False).square().sum((1, 2))

    def solve_products(self) -> Tensor:
        """Two triangular solves with the unit's block of G."""
        solved = torch.cholesky_solve(diagonal_blocks(self.g, self.width), self.factors())
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def invert_factors(self) -> Tensor:
        """Σ G∘(MᵀM), M = L^-1: less work than two solves with G."""
        factors = self.factors()
        identity = torch.eye(self.width, device=self.a.device).expand_as(factors)
        inverse = torch.linalg.solve_triangular(factors, identity, upper=False)
        with exact_float32():
            return (diagonal_blocks(self.g, self.width) * (inverse.mT @ inverse)).sum((1, 2))

    def invert_factors_singly(self) -> Tensor:
        """The same, one unit after the other: the batched factorisation is made for small matrices."""
        identity = torch.eye(self.width, device=self.a.device)
        errors = []
        with exact_float32():
            for a, g in zip(diagonal_blocks(self.a, self.width), diagonal_blocks(self.g, self.width), strict=True):
                factor = torch.linalg.cholesky_ex(a)[0]
                inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
                errors.append((g * (inverse.mT @ inverse)).sum())
        return torch.stack(errors)


def problem(units: int, width: int, outputs: int, device: torch.device) -> Problem:
    own = Units(units, width, outputs, device)
    exact = grouped_cholesky_errors_reference(own.a.double(), own.g.double(), width)
    return Problem(
        Candidate("own", own.operator),
        (
            Candidate(ACCURACY_REFERENCE, own.solve_products),
            Candidate("cholesky, inverse of the factor", own.invert_factors),
            Candidate("the same, unit by unit", own.invert_factors_singly),
            Candidate(
                "cholesky, solve with W, norm",
                own.solve_weights,
                kind=OTHER,
                source="the definition of Optimal Brain Surgeon on units, Hassibi & Stork 1993",
            ),
        ),
        lambda result: {"errors": (result / exact - 1).abs().max().item()},
        ACCURACY_REFERENCE,
        lambda plain: {"errors": 2 * plain["errors"] + ROUNDINGS},
    )


def case_of(where: str, units: int, width: int, outputs: int) -> Case:
    # Bytes: a triangle of a unit's blocks of A and G. FLOPs: w³/3 each for factor, its inverse and the product with G.
    work = Work(units * (4 * width * (width + 1) + 4), units * width**3)
    name, size = "grouped_cholesky_errors", (units, width)
    make = partial(problem, units, width, outputs)
    return Case(name, where, f"{units}x{width}", torch.float32, work, make, name, size)


def cases(model: Model, scale: Scale) -> Iterator[Case]:
    yield case_of(f"{model.name}-o", model.kv_heads, model.group * model.head_dim, model.hidden)


def sweep(scale: Scale) -> Iterator[Case]:
    """Many small units, and the widest that the kernel holds; wider ones are the models'."""
    outputs = 4096 if scale is FULL else 256
    for units, width in ((64, 128), (8, 256)) if scale is FULL else ((16, 32), (2, 256)):
        yield case_of(SWEEP, units, width, outputs)
