"""Selections of the residual stream, half its channels, at random or in runs: gather in the norm, scatter-add, both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ...ops import rms_norm_gather, scatter_add_, scatter_add_rms_norm_gather_
from ...ops.gather_scatter import (
    rms_norm_gather_reference,
    scatter_add_reference,
    scatter_add_rms_norm_gather_reference,
)
from ..case import FULL, OTHER, SWEEP, Candidate, Case, Problem, Scale, normal
from ..models import Model
from ..rates import Work
from .layer_steps import EPS, STEPS, against, as_the_steps

SOURCE = "transformers, LlamaRMSNorm, beside index_add_ and index_select as DISP-LLM has them, arXiv 2410.11988"


MEAN_RUN = 8  # channels: of a selection in runs


def random_selection(channels: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(channels, generator=generator)[:count].sort().values


def selection_in_runs(channels: int, count: int, generator: torch.Generator) -> Tensor:
    """Kept and dropped runs in turn, their lengths geometric; a stretch of them that has `count` channels."""
    runs = torch.empty(8 * channels, dtype=torch.float64).geometric_(1 / MEAN_RUN, generator=generator).long()
    kept = (torch.arange(len(runs)) % 2).repeat_interleave(runs)
    before = functional.pad(kept.cumsum(0), (1, 0))
    start = (before[channels:] - before[:-channels] == count).nonzero()[0, 0]
    return kept[start : start + channels].nonzero()[:, 0]


SELECTIONS = {"random": random_selection, "runs": selection_in_runs}


@dataclass(frozen=True)
class Stream:
    """A residual stream [tokens, hidden], what is added to `added` of its channels, and what is read: `read`."""

    stored: Tensor
    update: Tensor
    weight: Tensor
    added: Tensor
    read: Tensor

    @classmethod
    def random(cls, tokens: int, hidden: int, pattern: str, device: torch.device) -> Stream:
        count, generator = hidden // 2, torch.Generator().manual_seed(0)
        added, read = (SELECTIONS[pattern](hidden, count, generator) for _ in range(2))
        return cls(
            normal(device, torch.bfloat16, tokens, hidden),
            normal(device, torch.bfloat16, tokens, count, seed=1),
            normal(device, torch.bfloat16, hidden, seed=2),
            added.to(device),
            read.to(device),
        )

    def inverse_index(self) -> Tensor:
        """[hidden], a channel's place in the update, or -1."""
        inverse = torch.full((self.stored.shape[1],), -1, device=self.added.device)
        inverse[self.added] = torch.arange(len(self.added), device=self.added.device)
        return inverse


def norm_then_select(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, EPS).index_select(-1, index)


def add_by_inverse(residual: Tensor, update: Tensor, inverse: Tensor) -> Tensor:
    """index_add_ needs atomic additions; an index the other way round does not."""
    residual += torch.where(inverse >= 0, update.index_select(-1, inverse.clamp(min=0)), 0)
    return residual


def gather_problem(tokens: int, hidden: int, pattern: str, device: torch.device) -> Problem:
    stream = Stream.random(tokens, hidden, pattern, device)
    x, weight, read = stream.stored, stream.weight, stream.read
    exact = rms_norm_gather_reference(x.double(), weight.double(), EPS, read)
    return Problem(
        Candidate("own", lambda: rms_norm_gather(x, weight, EPS, read)),
        (
            Candidate(
                STEPS,
                lambda: rms_norm_gather_reference(x, weight, EPS, read),
                kind=OTHER,
                source=SOURCE,
                compilable=True,
            ),
            Candidate("functional.rms_norm, index_select", lambda: norm_then_select(x, weight, read), compilable=True),
        ),
        partial(against, exact),
        STEPS,
        as_the_steps,
    )


def scatter_problem(tokens: int, hidden: int, pattern: str, device: torch.device) -> Problem:
    stream = Stream.random(tokens, hidden, pattern, device)
    update, added, inverse = stream.update, stream.added, stream.inverse_index()
    residual = stream.stored.clone()
    exact = stream.stored.double()
    scatter_add_reference(exact, update.double(), added)

    def start() -> Tensor:
        return residual.copy_(stream.stored)

    def in_place(add: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            add(residual, update, added)
            return residual

        return run

    def assigned() -> Tensor:
        residual[:, added] += update
        return residual

    return Problem(
        Candidate("own", in_place(scatter_add_), start),
        (
            Candidate(STEPS, in_place(scatter_add_reference), start, OTHER, SOURCE, compilable=True),
            Candidate("residual[:, index] += update", assigned, start),
            Candidate(
                "gathered by the inverse index",
                lambda: add_by_inverse(residual, update, inverse),
                start,
                compilable=True,
            ),
        ),
        partial(against, exact),
        STEPS,
        as_the_steps,
    )


def whole_problem(tokens: int, hidden: int, pattern: str, device: torch.device) -> Problem:
    stream = Stream.random(tokens, hidden, pattern, device)
    update, weight, added, read = stream.update, stream.weight, stream.added, stream.read
    inverse, residual = stream.inverse_index(), stream.stored.clone()
    exact = scatter_add_rms_norm_gather_reference(
        stream.stored.double(), update.double(), added, weight.double(), EPS, read
    )

    def start() -> Tensor:
        return residual.copy_(stream.stored)

    def three_passes() -> Tensor:
        residual.index_add_(-1, added, update)
        return norm_then_select(residual, weight, read)

    def by_inverse() -> Tensor:
        return norm_then_select(add_by_inverse(residual, update, inverse), weight, read)

    arguments = (residual, update, added, weight, EPS, read)
    return Problem(
        Candidate("own", lambda: scatter_add_rms_norm_gather_(*arguments), start),
        (
            Candidate(
                STEPS, lambda: scatter_add_rms_norm_gather_reference(*arguments), start, OTHER, SOURCE, compilable=True
            ),
            Candidate("index_add_, functional.rms_norm, index_select", three_passes, start, compilable=True),
            Candidate("gathered by the inverse index, functional.rms_norm", by_inverse, start, compilable=True),
        ),
        partial(against, exact),
        STEPS,
        as_the_steps,
    )


def gather_case(where: str, tokens: int, hidden: int, pattern: str = "random") -> Case:
    """The stream is read; of the selected half a factor and a weight, and it is written."""
    n, half = tokens * hidden, tokens * (hidden // 2)
    work = Work(2 * n + 2 * half, 2 * n + 2 * half)
    return case_of("rms_norm_gather", where, tokens, hidden, work, partial(gather_problem, tokens, hidden, pattern))


def scatter_case(where: str, tokens: int, hidden: int, pattern: str = "random") -> Case:
    """Half of the stream is read and written, the update is read."""
    half = tokens * (hidden // 2)
    work = Work(6 * half, half)
    return case_of("scatter_add", where, tokens, hidden, work, partial(scatter_problem, tokens, hidden, pattern))


def whole_case(where: str, tokens: int, hidden: int, pattern: str = "random") -> Case:
    """The stream and the update are read; half of the stream and the result are written."""
    n, half = tokens * hidden, tokens * (hidden // 2)
    work = Work(2 * n + 6 * half, 2 * n + 3 * half)
    make = partial(whole_problem, tokens, hidden, pattern)
    return case_of("scatter_add_rms_norm_gather", where, tokens, hidden, work, make)


def case_of(
    operator: str, where: str, tokens: int, hidden: int, work: Work, make: Callable[[torch.device], Problem]
) -> Case:
    size, table = f"{tokens}x{hidden // 2}of{hidden}", (tokens, hidden)
    return Case(operator, where, size, torch.bfloat16, work, make, operator, table)


def gather_cases(model: Model, scale: Scale) -> Iterator[Case]:
    yield gather_case(model.name, scale.activations, model.hidden)


def scatter_cases(model: Model, scale: Scale) -> Iterator[Case]:
    yield scatter_case(model.name, scale.activations, model.hidden)


def whole_cases(model: Model, scale: Scale) -> Iterator[Case]:
    yield whole_case(model.name, scale.activations, model.hidden)


def swept(case: Callable[[str, int, int, str], Case], scale: Scale) -> Iterator[Case]:
    """A single token, as in decoding, and channels that lie in runs."""
    for hidden in (4096, 8192) if scale is FULL else (256,):
        yield case(SWEEP, 1, hidden, "random")
        for tokens in (1, scale.activations):
            yield case(f"{SWEEP}-runs", tokens, hidden, "runs")


def gather_sweep(scale: Scale) -> Iterator[Case]:
    return swept(gather_case, scale)


def scatter_sweep(scale: Scale) -> Iterator[Case]:
    return swept(scatter_case, scale)


def whole_sweep(scale: Scale) -> Iterator[Case]:
    return swept(whole_case, scale)
