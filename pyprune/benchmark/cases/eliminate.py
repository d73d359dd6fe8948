"""Removal of a fifth of an output projection's channels with a refit; the shared first inverse is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops import eliminate, lower_gram, refit, use_backend
from ...ops.eliminate import Elimination, launch_reference
from ...ops.precision import exact_float32
from ..case import FULL, OTHER, SWEEP, Candidate, Case, Errors, Problem, Scale, normal
from ..models import Model
from ..rates import Work
from .inverse import PROBE_ROWS, damped_hessian
from .slimgpt import SlimGpt, inverse

REMOVED = 0.2
# The error that a choice in float32 leaves, over that of float64's choice, less 1: the bound of the operator's tests.
ALLOWED = 1e-3

Refitted = tuple[Tensor, Tensor]  # kept channels, ascending; their weights [out, kept]


def least_flops(channels: int, count: int, outputs: int) -> int:
    """WᵀW; three triangles (of A one, of G two) of what is left, for each removal; the refit's solve and product."""
    left = [(channels - k) ** 2 for k in range(1, count + 1)]
    return outputs * channels**2 + 3 * sum(left) + outputs * count * (count + 2 * (channels - count))


def error_left(hessian: Tensor, weight: Tensor, result: Refitted) -> float:
    """tr(D H Dᵀ) in float64, D what has become of W: the squared error of the outputs."""
    kept, refitted = result
    change = weight.double()
    change[:, kept] -= refitted.double()
    total = 0.0
    for first in range(0, len(hessian), PROBE_ROWS):
        columns = slice(first, first + PROBE_ROWS)
        total += ((change @ hessian[:, columns].double()) * change[:, columns]).sum().item()
    return total


def refitted_by(elimination: Elimination, weight: Tensor) -> Refitted:
    return elimination.kept_channels(), refit(weight, elimination)


def exact_choice(hessian: Tensor, weight: Tensor, count: int) -> Refitted:
    wide = weight.double()
    first_inverse = inverse(hessian.double()).clone(memory_format=torch.contiguous_format)
    return refitted_by(eliminate(first_inverse, wide.T @ wide, count), wide)


def problem(channels: int, outputs: int, count: int, device: torch.device) -> Problem:
    hessian = damped_hessian(channels, device)
    weight = normal(device, torch.float32, outputs, channels, seed=2)
    best = error_left(hessian, weight, exact_choice(hessian, weight, count))
    first_inverse = inverse(hessian).clone(memory_format=torch.contiguous_format)
    a = torch.empty_like(first_inverse)

    def own() -> Refitted:
        with use_backend(None):  # it is the elimination whose backend is told
            gram = lower_gram(weight)
        return refitted_by(eliminate(a, gram, count), weight)

    def in_pytorch() -> Refitted:
        with exact_float32():
            order, errors, factor = launch_reference(a, weight.T @ weight, count, True, False)
        return refitted_by(Elimination(order, errors, factor, 1), weight)

    def by_slimgpt() -> Refitted:
        with exact_float32():
            loop = SlimGpt(hessian, first_inverse, weight)
            loop.run(count)
        return loop.channels, loop.weight

    def errors(result: Refitted) -> Errors:
        return {"choice": error_left(hessian, weight, result) / best - 1}

    def start() -> Tensor:
        return a.copy_(first_inverse)

    return Problem(
        Candidate("own", own, start),
        (
            Candidate("pivoted elimination in PyTorch, the reference", in_pytorch, start),
            Candidate("steps of up to 1024 channels", by_slimgpt, kind=OTHER, source="SlimGPT, arXiv 2412.18110"),
        ),
        errors,
        "pivoted elimination in PyTorch, the reference",
        lambda plain: {"choice": ALLOWED},
    )


def case_of(where: str, channels: int, outputs: int, share: float) -> Case:
    count = int(share * channels)
    # W and triangles of A are read, the refitted W is written; what is kept between needs not leave the device's cache.
    moved = 2 * channels**2 + 4 * outputs * (2 * channels - count)
    work = Work(moved, least_flops(channels, count, outputs))
    make: Callable[[torch.device], Problem] = partial(problem, channels, outputs, count)
    size, table = f"{count}of{channels}", (channels, channels)
    return Case("eliminate", where, size, torch.float32, work, make, "eliminate", table)


def cases(model: Model, scale: Scale) -> Iterator[Case]:
    yield case_of(f"{model.name}-down", model.intermediate, model.hidden, REMOVED)


def sweep(scale: Scale) -> Iterator[Case]:
    """Half of the channels, of few and of many."""
    for channels, outputs in ((4096, 4096), (11008, 4096)) if scale is FULL else ((256, 64), (512, 64)):
        yield case_of(SWEEP, channels, outputs, 0.5)
