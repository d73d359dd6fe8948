"""Two of every four weights of an output projection to zero, the rest refitted; the factor of the inverse, which all
share, is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops import sparsify_, spd_inverse_factor
from ...ops.precision import exact_float32
from ...ops.sparsify import sparsify_reference
from ..case import OTHER, SMALL, Candidate, Case, Errors, Problem, Scale, normal
from ..models import Model
from ..rates import Work
from .inverse import PROBE_ROWS, damped_hessian

ZEROS, GROUP, BLOCK = 2, 4, 128
# The error that masks chosen in float32 leave, over that of float64's, less 1. Close calls fall either way, and what
# follows a weight that fell otherwise is another walk of the same worth: on a CPU at 3072 channels 1e-5.
ALLOWED = 1e-3


def error_left(hessian: Tensor, weight: Tensor, sparse: Tensor) -> float:
    """tr(D H Dᵀ) in float64, D what has become of W: the squared error of the outputs."""
    change = weight.double() - sparse.double()
    total = 0.0
    for first in range(0, len(hessian), PROBE_ROWS):
        columns = slice(first, first + PROBE_ROWS)
        total += ((change @ hessian[:, columns].double()) * change[:, columns]).sum().item()
    return total


def by_columns(weight: Tensor, factor: Tensor) -> None:
    """The published loop: each column's error to the rest of its block at once, to what is behind a block later."""
    for first in range(0, weight.shape[1], BLOCK):
        own = slice(first, first + BLOCK)
        block, inner = weight[:, own].clone(), factor[own, own]
        errors, mask = torch.zeros_like(block), torch.zeros_like(block, dtype=torch.bool)
        pivots = inner.diagonal()
        for column in range(block.shape[1]):
            if column % GROUP == 0:
                scores = (block[:, column : column + GROUP] / pivots[column : column + GROUP]).square()
                lowest = scores.topk(ZEROS, dim=1, largest=False).indices
                mask.scatter_(1, column + lowest, True)
            value = block[:, column]
            left = value.masked_fill(mask[:, column], 0)
            error = (value - left) / pivots[column]
            block[:, column:] -= error[:, None] * inner[column, column:]
            block[:, column], errors[:, column] = left, error
        weight[:, own] = block
        weight[:, own.stop :] -= errors @ factor[own, own.stop :]


def problem(channels: int, outputs: int, device: torch.device) -> Problem:
    hessian = damped_hessian(channels, device)
    weight = normal(device, torch.float32, outputs, channels, seed=2)
    factor = spd_inverse_factor(hessian, 0.0)[0]
    exact = weight.double()
    sparsify_reference(exact, spd_inverse_factor(hessian.double(), 0.0)[0], ZEROS, GROUP)
    best = error_left(hessian, weight, exact)
    del exact
    work = torch.empty_like(weight)

    def start() -> Tensor:
        return work.copy_(weight)

    def own() -> Tensor:
        sparsify_(work, factor, ZEROS, GROUP)
        return work

    def in_pytorch() -> Tensor:
        sparsify_reference(work, factor, ZEROS, GROUP)
        return work

    def by_sparsegpt() -> Tensor:
        with exact_float32():
            by_columns(work, factor)
        return work

    def errors(sparse: Tensor) -> Errors:
        return {"choice": error_left(hessian, weight, sparse) / best - 1}

    return Problem(
        Candidate("own", own, start),
        (
            Candidate("a block's columns in PyTorch, the reference", in_pytorch, start),
            Candidate("a column at a time", by_sparsegpt, start, kind=OTHER, source="SparseGPT, arXiv 2301.00774"),
        ),
        errors,
        "a block's columns in PyTorch, the reference",
        lambda plain: {"choice": ALLOWED},
    )


def cases(model: Model, scale: Scale) -> Iterator[Case]:
    place, channels, outputs = "down", model.intermediate, model.hidden
    if scale is SMALL:  # a column takes a CPU milliseconds, and baselines walk one at a time
        place, channels, outputs = "k", model.hidden, model.kv_heads * model.head_dim
    # U's triangle and W are read, W is written; half of the errors are zero.
    work = Work(2 * channels**2 + 8 * outputs * channels, outputs * channels**2 // 2)
    make, shape = partial(problem, channels, outputs), (outputs, BLOCK)
    yield Case(
        "sparsify", f"{model.name}-{place}", f"{outputs}x{channels}", torch.float32, work, make, "sparsify", shape
    )
