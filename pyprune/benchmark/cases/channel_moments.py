"""Channel moments: of an output projection's inputs, against torch.var_mean and FLAP's running update."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops import channel_moments_update
from ...ops.precision import exact_float32
from ..case import FULL, OTHER, SWEEP, Candidate, Case, Errors, Problem, Scale, normal, row_weights
from ..models import Model
from ..rates import Work

CHECKED_CHANNELS = 512  # channels that are copied to float64 at a time
# An error may be twice torch.var_mean's in float32 and 9 roundings more: eight for the merges of chunks and state, one
# of a mean that is as large as a deviation (x is centred).
ROUNDINGS = 9 * 2.0**-24
ACCURACY_REFERENCE = "var_mean(float32)"
WEIGHTED_REFERENCE = "weighted mean, then weighted squares (float32)"
# (rows, channels) with weights.
WEIGHTED, SMALL_WEIGHTED = (65536, 4096), (512, 256)


class Flap:
    """One update of FLAP as its authors' code does it: step by step, with full-size float32 temporaries.

    `old` is the same tensor as the new baseline there, so v grows by Σ (x − m_new)² / n (arXiv 2312.11983).
    They work on x transposed; with `transposed` False the same steps run over x as it lies.
    """

    def __init__(self, x: Tensor, transposed: bool) -> None:
        self.samples = 1
        self.transposed = transposed
        self.baseline = torch.zeros(x.shape[1], device=x.device)
        self.fluctuation = torch.zeros_like(self.baseline)

    def update(self, x: Tensor) -> None:
        tokens = 1 if self.transposed else 0
        values = x.float().t() if self.transposed else x.float()  # [C, T] or [T, C]
        old = self.baseline
        self.baseline *= self.samples / (self.samples + 1)
        self.baseline += values.mean(tokens) / (self.samples + 1)
        self.fluctuation *= (self.samples - 1) / self.samples
        spread = (values - self.baseline.unsqueeze(tokens)) * (values - old.unsqueeze(tokens))
        self.fluctuation += spread.sum(tokens) / (self.samples + 1)
        self.samples += 1


def largest_errors(x: Tensor, mean: Tensor, m2: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """max |Δmean| / max|x| and max |ΔM2| / M2 over the channels, against float64. weights: float32 [rows], w."""
    mean_error = m2_error = 0.0
    squares = (torch.ones(len(x), device=x.device) if weights is None else weights).double().square()
    for first in range(0, x.shape[1], CHECKED_CHANNELS):
        columns = slice(first, first + CHECKED_CHANNELS)
        exact = x[:, columns].double()
        exact_mean = squares @ exact / squares.sum()
        exact_m2 = squares @ (exact - exact_mean).square_()
        mean_error = max(mean_error, ((mean[columns] - exact_mean).abs().max() / exact.abs().max()).item())
        m2_error = max(m2_error, ((m2[columns] - exact_m2).abs() / exact_m2).max().item())
    return mean_error, m2_error


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    return mean, variance * len(x)


def weighted_var_mean(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    values, squares = x.float(), weights.square().unsqueeze(1)
    mean = (squares * values).sum(0) / squares.sum()
    return mean, (squares * (values - mean).square()).sum(0)


def weighted_products(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w² x and Σ w² x² as products of a row with a matrix; M2 is their difference."""
    values, squares = x.float(), weights.square()
    total = squares.sum()
    mean = squares @ values / total
    return mean, squares @ values.square_() - total * mean.square()


def weighted_problem(rows: int, channels: int, device: torch.device) -> Problem:
    x, weights = normal(device, torch.bfloat16, rows, channels), row_weights(device, rows)
    state = torch.zeros(2, channels, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)

    def own() -> tuple[Tensor, Tensor]:
        mean, m2 = state
        channel_moments_update(x, 0, mean, m2, weights, total)
        return mean, m2

    def errors(result: tuple[Tensor, Tensor]) -> Errors:
        return dict(zip(("mean", "M2"), largest_errors(x, *result, weights), strict=True))

    def products() -> tuple[Tensor, Tensor]:
        with exact_float32():
            return weighted_products(x, weights)

    return Problem(
        Candidate("own", own, state.zero_),
        (
            Candidate(WEIGHTED_REFERENCE, partial(weighted_var_mean, x, weights), compilable=True),
            Candidate("w² @ x and w² @ x², subtracted (float32)", products),
        ),
        errors,
        WEIGHTED_REFERENCE,
        lambda plain: {name: 2 * error + ROUNDINGS for name, error in plain.items()},
    )


def problem(rows: int, channels: int, device: torch.device) -> Problem:
    x = normal(device, torch.bfloat16, rows, channels)
    state = torch.zeros(2, channels, device=device)

    def own() -> tuple[Tensor, Tensor]:
        mean, m2 = state
        channel_moments_update(x, 0, mean, m2)
        return mean, m2

    def errors(result: tuple[Tensor, Tensor]) -> Errors:
        return dict(zip(("mean", "M2"), largest_errors(x, *result), strict=True))

    return Problem(
        Candidate("own", own, state.zero_),
        (
            Candidate(ACCURACY_REFERENCE, lambda: var_mean(x.float()), compilable=True),
            Candidate("var_mean(bfloat16), which rounds its result", lambda: var_mean(x)),
            *(
                # It keeps another quantity, whose error cannot be compared.
                Candidate(name, partial(Flap(x, way).update, x), kind=OTHER, source="FLAP, arXiv 2312.11983")
                for name, way in (("running update of x transposed", True), ("running update of x", False))
            ),
        ),
        errors,
        ACCURACY_REFERENCE,
        lambda plain: {name: 2 * error + ROUNDINGS for name, error in plain.items()},
    )


def case_of(where: str, rows: int, channels: int) -> Case:
    # Read once; two sums of a tile, a difference and a square. Mean and M2 are read and written.
    work = Work(2 * rows * channels + 16 * channels, 4 * rows * channels)
    size, make = (rows, channels), partial(problem, rows, channels)
    return Case("channel_moments", where, f"{rows}x{channels}", torch.bfloat16, work, make, "channel_moments", size)


def weighted_case(rows: int, channels: int) -> Case:
    # The weights are read as well, and multiply each value twice.
    work = Work(2 * rows * channels + 16 * channels + 4 * rows, 6 * rows * channels)
    size, make = (rows, channels), partial(weighted_problem, rows, channels)
    name = f"{rows}x{channels}"
    return Case("channel_moments", "weighted", name, torch.bfloat16, work, make, "channel_moments", size)


def cases(model: Model, scale: Scale) -> Iterator[Case]:
    for place, channels in model.output_projs().items():
        yield case_of(f"{model.name}-{place}", scale.statistics, channels)


def sweep(scale: Scale) -> Iterator[Case]:
    """Yield cases from less than a tile, of an odd width, to more rows than a run updates with; one with weights."""
    large = ((2048, 4096), (65536, 4096), (262144, 4096), (65536, 11008))
    for rows, channels in ((37, 1000), *(large if scale is FULL else ((512, 4096),))):
        yield case_of(SWEEP, rows, channels)
    yield weighted_case(*(WEIGHTED if scale is FULL else SMALL_WEIGHTED))
