"""Runs cases: every candidate is compared with float64 first, then all that may are timed on the same tensors.

It knows no operator; case.py says what it is given, results.py what a row holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from ..errors import VerificationError
from ..ops import use_backend
from ..ops.requirements import dtype_name
from .case import OURS, Candidate, Case, Errors, Problem, on_backends
from .rates import Rates
from .timing import Timer

# Seconds that the repetitions of one candidate take, within the least and the most number of them.
SECONDS = 0.3

TIMED, WRONG, OUT_OF_MEMORY, FAILED, UNJUDGED = "timed", "wrong", "out of memory", "failed", "unjudged"
UNSUPPORTED = "unsupported"


@dataclass
class Measurement:
    """Outcome of a candidate. status: one of the words above; reason: why it was not timed."""

    candidate: Candidate
    status: str = TIMED
    reason: str = ""
    errors: Errors | None = None
    peak_bytes: int | None = None
    figures: dict[str, Any] | None = None

    def fail(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    @property
    def is_fault(self) -> bool:
        """Whether our operator gave a wrong result or none; that memory ran out is no fault."""
        return self.candidate.kind == OURS and self.status in (WRONG, FAILED)

    def document(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name,
            "kind": self.candidate.kind,
            "source": self.candidate.source,
            "status": self.status,
            "reason": self.reason,
            "errors": self.errors,
            "peak_bytes": self.peak_bytes,
            "microseconds": self.figures,
        }


class Runner:
    """Rows on one device. wanted: the backends that may compete, none named: those that would be chosen from.

    repeat: repetitions at most. compiled: baselines also under torch.compile.
    """

    def __init__(
        self, device: torch.device, timer: Timer, rates: Rates, wanted: Sequence[str] = (), compiled: bool = False
    ) -> None:
        self.device, self.timer, self.rates = device, timer, rates
        self.wanted, self.compiled = tuple(wanted), compiled

    def row(self, case: Case) -> dict[str, Any]:
        """The row of a case, see results.py. VerificationError where the device no longer answers."""
        row = self.run(case)
        self.free()
        return row

    def run(self, case: Case) -> dict[str, Any]:
        outcomes: list[Measurement] = []
        allowed: Errors = {}
        reason = ""
        try:
            with use_backend(None):
                problem = case.make(self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"the inputs do not fit: {first_line(error)}"
        else:
            outcomes, allowed = self.compete(case, problem)
        floor = self.rates.floor(case.work)
        return {
            "id": case.id,
            "operator": case.operator,
            "where": case.where,
            "size": case.size,
            "dtype": dtype_name(case.dtype),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "bytes": case.work.bytes,
            "flops": case.work.flops,
            "products": case.work.products,
            "floor_microseconds": floor.microseconds,
            "bound": floor.bound,
            "allowed": allowed,
            "reason": reason,
            "candidates": [outcome.document() for outcome in outcomes],
            "faults": [f"{o.candidate.name}: {o.status}: {o.reason}" for o in outcomes if o.is_fault],
        }

    def compete(self, case: Case, problem: Problem) -> tuple[list[Measurement], Errors]:
        baselines = [*problem.baselines]
        if self.compiled:
            baselines += [compiled_baseline(baseline) for baseline in problem.baselines if baseline.compilable]
        own = [Measurement(c) for c in on_backends(problem.own, case.backends(self.device, self.wanted))]
        others = [Measurement(baseline) for baseline in baselines]
        for outcome in [*others, *own]:
            self.check(outcome, problem)
        accuracy_reference = next(outcome for outcome in others if outcome.candidate.name == problem.accuracy_reference)
        allowed = {} if accuracy_reference.errors is None else problem.allowed(accuracy_reference.errors)
        for outcome in own:
            judge(outcome, allowed, accuracy_reference)
        for outcome in [*own, *others]:
            if outcome.status == TIMED:
                self.time(outcome)
        return [*own, *others], allowed

    def check(self, outcome: Measurement, problem: Problem) -> None:
        """Call once: the result's errors, and what the call allocates."""

        def call() -> None:
            candidate = outcome.candidate
            candidate.prepare()
            before = self.allocated()
            result = candidate.run()
            outcome.peak_bytes = self.peak_since(before)
            if result is not None:
                outcome.errors = problem.errors(result)

        self.guarded(outcome, call)

    def time(self, outcome: Measurement) -> None:
        def call() -> None:
            candidate = outcome.candidate
            outcome.figures = asdict(self.timer.within(SECONDS, candidate.run, candidate.prepare))

        self.guarded(outcome, call)

    def guarded(self, outcome: Measurement, call: Callable[[], None]) -> None:
        """Turn what a candidate raises into its outcome; a device that broke down ends the run."""
        own = outcome.candidate.kind == OURS
        try:
            with use_backend(outcome.candidate.name if own and outcome.candidate.name != OURS else None):
                call()
        except torch.AcceleratorError as error:
            name = outcome.candidate.name
            raise VerificationError(
                f"{name}: the device no longer answers ({first_line(error)}); --resume goes on with the next start"
            ) from error
        except Exception as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            if isinstance(error, NotImplementedError) and not own:
                status = UNSUPPORTED
            outcome.fail(status, f"{type(error).__name__}: {first_line(error)}")
            self.free()

    def allocated(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_since(self, before: int) -> int | None:
        """Bytes that were allocated at most beside what was there; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def judge(outcome: Measurement, allowed: Errors, accuracy_reference: Measurement) -> None:
    """Our result is wrong unless each of its errors is within the limit."""
    if outcome.status != TIMED:
        return
    if not allowed:
        outcome.fail(
            UNJUDGED, f"the limit is {accuracy_reference.candidate.name}'s to set: {accuracy_reference.status}"
        )
        return
    errors = outcome.errors or {}
    beyond = [f"error of {what} {errors.get(what, float('nan')):.2g}, allowed {most:.2g}"
              for what, most in allowed.items() if not errors.get(what, float("nan")) <= most]  # fmt: skip
    if beyond:
        outcome.fail(WRONG, "; ".join(beyond))


def compiled_baseline(baseline: Candidate) -> Candidate:
    # Baselines share their code between sizes, and torch.compile gives up on code after a few of them.
    torch.compiler.reset()
    run = torch.compile(baseline.run, dynamic=False)
    return replace(baseline, name=f"{baseline.name}, compiled", run=run)


def is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's allocator of host memory raises a RuntimeError of these words.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].split(". ")[0][:300]
