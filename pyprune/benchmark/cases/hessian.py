"""Hessian accumulation, H += XᵀX of an output projection's inputs in bfloat16, and its completion to both triangles.

The sweep also adds up many updates: what sums that are cut off, not rounded, take from the diagonal grows with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...ops.hessian import hessian_finish, hessian_update
from ...ops.precision import exact_float32
from ..case import FULL, OTHER, SWEEP, Candidate, Case, Problem, Scale, normal, row_weights
from ..models import Model
from ..rates import Work

CHECKED_COLUMNS = 64  # at the start, in the middle and at the end
FLOAT64_COLUMNS = 4096  # channels that are copied to float64 at a time
CHECKED_ROWS = 2048  # of a completed matrix that are compared at a time

# Allowed error beside twice that of float32, relative to ‖x_i‖·‖x_j‖: tensor cores cut off
# 3.3e-9 a row on the average, up to twice that, until the accumulator is flushed, after at most 3072 rows in CUDA,
# 1536 in Triton; the rest is rounding of the state.
TRUNCATION, MOST_FLUSH_ROWS, ROUNDINGS = 6e-9, 3072, 2.0**-22

# (x, H) -> None: one update
Update = Callable[[Tensor, Tensor], None]


def update_mm(x: Tensor, h: Tensor) -> None:
    h += torch.mm(x.t(), x, out_dtype=torch.float32)


def update_addmm(x: Tensor, h: Tensor) -> None:
    torch.addmm(h, x.t(), x, out_dtype=torch.float32, out=h)


def update_mm_in_chunks(x: Tensor, h: Tensor) -> None:
    for chunk in x.split(8192):
        h += torch.mm(chunk.t(), chunk, out_dtype=torch.float32)


def update_float32_addmm(x: Tensor, h: Tensor) -> None:
    values = x.float()
    h.addmm_(values.t(), values)


def update_float32(x: Tensor, h: Tensor) -> None:
    values = x.float()
    h += values.t() @ values


# Products in bfloat16, sums in float32.
HALF_WAYS: dict[str, Update] = {
    "h += mm(out_dtype=float32)": update_mm,
    "addmm(h, out_dtype=float32, out=h)": update_addmm,
    "h += mm(out_dtype=float32), 8192 rows at a time": update_mm_in_chunks,
}
ACCURACY_REFERENCE = "h += x.float().T @ x.float()"

# (rows, channels) with weights.
WEIGHTED, SMALL_WEIGHTED = (32768, 4096), (512, 256)
# (rows, channels, rows an update) of the drift: 1 M tokens as a run accumulates them, 8 GiB.
DRIFT, SMALL_DRIFT = (2**20, 4096, 2**15), (2**12, 64, 2**7)


def update_ours(x: Tensor, h: Tensor) -> None:
    hessian_update(x, h, None)


def largest_error(x: Tensor, h: Tensor) -> float:
    """max |h_ij − (xᵀx)_ij| / (‖x_i‖·‖x_j‖) on and below the diagonal of three blocks of columns, against float64."""
    channels = x.shape[1]
    norms = torch.cat([part.double().square().sum(0) for part in x.split(FLOAT64_COLUMNS, dim=1)]).sqrt()
    error = 0.0
    for first in {0, channels // 2, max(0, channels - CHECKED_COLUMNS)}:
        columns = slice(first, first + CHECKED_COLUMNS)
        right = x[:, columns].double()
        for top in range(first, channels, FLOAT64_COLUMNS):
            rows = slice(top, top + FLOAT64_COLUMNS)
            exact = x[:, rows].double().t() @ right
            relative = (h[rows, columns].double() - exact).abs() / torch.outer(norms[rows], norms[columns])
            error = max(error, relative.tril(top - first).max().item())
    return error


def largest_allowed(float32_error: float, rows: int) -> float:
    return 2 * float32_error + TRUNCATION * min(rows, MOST_FLUSH_ROWS) + ROUNDINGS


def problem(rows: int, channels: int, device: torch.device) -> Problem:
    x = normal(device, torch.bfloat16, rows, channels)
    h = torch.zeros(channels, channels, device=device)

    def updated_by(update: Update) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with exact_float32():
                update(x, h)
            return h

        return run

    def own() -> Tensor:
        update_ours(x, h)
        return h

    return Problem(
        Candidate("own", own, h.zero_),
        (
            Candidate(
                ACCURACY_REFERENCE,
                updated_by(update_float32),
                h.zero_,
                OTHER,
                "GPTQ, SparseGPT and SlimGPT accumulate so, arXiv 2210.17323, 2301.00774, 2412.18110",
            ),
            *(Candidate(name, updated_by(update), h.zero_) for name, update in HALF_WAYS.items()),
            Candidate("h.addmm_(x.float().T, x.float())", updated_by(update_float32_addmm), h.zero_),
        ),
        lambda result: {"H": largest_error(x, result)},
        ACCURACY_REFERENCE,
        lambda plain: {"H": largest_allowed(plain["H"], rows)},
    )


def weighted_problem(rows: int, channels: int, device: torch.device) -> Problem:
    """The same with weights, which plain PyTorch brings in with a scaled copy of the rows."""
    x = normal(device, torch.bfloat16, rows, channels)
    weights = row_weights(device, rows)
    factors = weights.bfloat16().unsqueeze(1)  # [rows, 1]
    h = torch.zeros(channels, channels, device=device)

    def scaled(update: Update) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with exact_float32():
                update(x * factors, h)
            return h

        return run

    def own() -> Tensor:
        hessian_update(x, h, None, weights)
        return h

    return Problem(
        Candidate("own", own, h.zero_),
        (
            Candidate(ACCURACY_REFERENCE, scaled(update_float32), h.zero_),
            *(Candidate(f"x * w, then {name}", scaled(update), h.zero_) for name, update in HALF_WAYS.items()),
            Candidate("x * w, then hessian_update", scaled(update_ours), h.zero_),
        ),
        lambda result: {"H": largest_error(x * factors, result)},
        ACCURACY_REFERENCE,
        lambda plain: {"H": largest_allowed(plain["H"], rows)},
    )


def half_diagonal(lower: Tensor) -> Tensor:
    h = lower + lower.T
    h.diagonal().mul_(0.5)
    return h


def largest_difference(h: Tensor, lower: Tensor) -> float:
    """max |h_ij − l_ij| on both sides of the diagonal, l the lower triangle as it was."""
    difference = 0.0
    for first in range(0, len(h), CHECKED_ROWS):
        below, last = lower[first : first + CHECKED_ROWS], first + CHECKED_ROWS
        for found in (h[first:last], h[:, first:last].T):
            difference = max(difference, (found - below).tril_(first).abs_().max().item())
    return difference


def finish_problem(channels: int, device: torch.device) -> Problem:
    lower = normal(device, torch.float32, channels, channels)
    h = torch.empty_like(lower)

    def start() -> Tensor:
        return h.copy_(lower)

    def own() -> Tensor:
        hessian_finish(h, None, 1)
        return h

    return Problem(
        Candidate("own", own, start),
        (
            Candidate("h.tril() + h.tril(-1).T", lambda: h.tril() + h.tril(-1).T, start),
            Candidate("h.tril_() + h.T, half the diagonal", lambda: half_diagonal(h.tril_()), start),
            Candidate("h.tril_().add_(h.tril(-1).T)", lambda: h.tril_().add_(h.tril(-1).T), start),
        ),
        lambda result: {"H": largest_difference(result, lower)},
        "h.tril() + h.tril(-1).T",
        lambda plain: {"H": 0.0},  # elements move
    )


def mean_drift(h: Tensor, exact: Tensor) -> float:
    """|mean(diag(H) / exact − 1)|: rounding cancels out in the mean, cutting off does not."""
    return abs((h.diagonal().double() / exact - 1).mean().item())


def drift_problem(rows: int, channels: int, batch: int, device: torch.device) -> Problem:
    x = normal(device, torch.bfloat16, rows, channels, seed=1)
    h = torch.zeros(channels, channels, device=device)
    exact = torch.zeros(channels, dtype=torch.float64, device=device)
    for part in x.split(batch):
        exact += part.double().square_().sum(0)

    def updated_by(update: Update) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with exact_float32():
                for part in x.split(batch):
                    update(part, h)
            return h

        return run

    return Problem(
        Candidate("own", updated_by(update_ours), h.zero_),
        (
            Candidate(ACCURACY_REFERENCE, updated_by(update_float32), h.zero_),
            Candidate("h += mm(out_dtype=float32)", updated_by(update_mm), h.zero_),
        ),
        lambda result: {"diagonal": mean_drift(result, exact)},
        ACCURACY_REFERENCE,
        lambda plain: {"diagonal": largest_allowed(plain["diagonal"], batch)},
    )


def update_work(rows: int, channels: int, updates: int = 1) -> Work:
    """x is read once; the triangle of H is read and written at every update."""
    triangle = channels * (channels + 1) // 2
    return Work(2 * rows * channels + 8 * triangle * updates, 2 * rows * triangle, "bfloat16")


def case_of(where: str, rows: int, channels: int) -> Case:
    size, make = (rows, channels), partial(problem, rows, channels)
    work = update_work(rows, channels)
    return Case("hessian", where, f"{rows}x{channels}", torch.bfloat16, work, make, "hessian", size)


def cases(model: Model, scale: Scale) -> Iterator[Case]:
    for place, channels in model.output_projs().items():
        yield case_of(f"{model.name}-{place}", scale.statistics, channels)


def weighted_case(rows: int, channels: int) -> Case:
    work = update_work(rows, channels)
    work = replace(work, bytes=work.bytes + 4 * rows)
    size, make = (rows, channels), partial(weighted_problem, rows, channels)
    return Case("hessian", "weighted", f"{rows}x{channels}", torch.bfloat16, work, make, "hessian", size)


def sweep(scale: Scale) -> Iterator[Case]:
    """Few rows, few channels, many of either; rows with weights; the drift of the diagonal over many updates."""
    large = ((2048, 4096), (32768, 2048), (131072, 4096), (16384, 28672))
    for rows, channels in large if scale is FULL else ((64, 256), (4096, 512)):
        yield case_of(SWEEP, rows, channels)
    yield weighted_case(*(WEIGHTED if scale is FULL else SMALL_WEIGHTED))
    rows, channels, batch = DRIFT if scale is FULL else SMALL_DRIFT
    work = update_work(rows, channels, rows // batch)
    size, make = f"{rows}x{channels}by{batch}", partial(drift_problem, rows, channels, batch)
    yield Case("hessian", "drift", size, torch.bfloat16, work, make, "hessian", (batch, channels))


def finish_cases(model: Model, scale: Scale) -> Iterator[Case]:
    for place, channels in model.output_projs().items():
        work = Work(4 * channels * channels, 0)  # one triangle is read, the other written
        make = partial(finish_problem, channels)
        yield Case("hessian_finish", f"{model.name}-{place}", f"{channels}x{channels}", torch.float32, work, make)
