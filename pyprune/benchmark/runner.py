"""Runs cases: every contestant is compared with float64 first, then all that may are timed on the same tensors.

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
from .case import OURS, Case, Contestant, Errors, Problem, on_backends
from .rates import Rates
from .timing import Timer

# Seconds that the repetitions of one contestant take, within the least and the most number of them.
SECONDS = 0.3

TIMED, WRONG, OUT_OF_MEMORY, FAILED, UNJUDGED = "timed", "wrong", "out of memory", "failed", "unjudged"
UNSUPPORTED = "unsupported"


@dataclass
class Measurement:
    """What became of a contestant. status: one of the words above; reason: why it was not timed."""

    contestant: Contestant
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
        return self.contestant.kind == OURS and self.status in (WRONG, FAILED)

    def document(self) -> dict[str, Any]:
        return {
            "name": self.contestant.name,
            "kind": self.contestant.kind,
            "source": self.contestant.source,
            "status": self.status,
            "reason": self.reason,
            "errors": self.errors,
            "peak_bytes": self.peak_bytes,
            "microseconds": self.figures,
        }


class Runner:
    """Rows on one device. wanted: the backends that may compete, none named: those that would be chosen from.

    repeat: repetitions at most. compiled: rivals also under torch.compile.
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
            "contestants": [outcome.document() for outcome in outcomes],
            "faults": [f"{o.contestant.name}: {o.status}: {o.reason}" for o in outcomes if o.is_fault],
        }

    def compete(self, case: Case, problem: Problem) -> tuple[list[Measurement], Errors]:
        rivals = [*problem.rivals]
        if self.compiled:
            rivals += [compiled_rival(rival) for rival in problem.rivals if rival.compilable]
        own = [Measurement(c) for c in on_backends(problem.own, case.backends(self.device, self.wanted))]
        others = [Measurement(rival) for rival in rivals]
        for outcome in [*others, *own]:
            self.check(outcome, problem)
        yardstick = next(outcome for outcome in others if outcome.contestant.name == problem.yardstick)
        allowed = {} if yardstick.errors is None else problem.allowed(yardstick.errors)
        for outcome in own:
            judge(outcome, allowed, yardstick)
        for outcome in [*own, *others]:
            if outcome.status == TIMED:
                self.time(outcome)
        return [*own, *others], allowed

    def check(self, outcome: Measurement, problem: Problem) -> None:
        """Call once: the result's errors, and what the call allocates."""

        def call() -> None:
            contestant = outcome.contestant
            contestant.prepare()
            before = self.allocated()
            result = contestant.run()
            outcome.peak_bytes = self.peak_since(before)
            if result is not None:
                outcome.errors = problem.errors(result)

        self.guarded(outcome, call)

    def time(self, outcome: Measurement) -> None:
        def call() -> None:
            contestant = outcome.contestant
            outcome.figures = asdict(self.timer.within(SECONDS, contestant.run, contestant.prepare))

        self.guarded(outcome, call)

    def guarded(self, outcome: Measurement, call: Callable[[], None]) -> None:
        """Whatever a contestant raises is its outcome; a device that broke down ends the run."""
        own = outcome.contestant.kind == OURS
        try:
            with use_backend(outcome.contestant.name if own and outcome.contestant.name != OURS else None):
                call()
        except torch.AcceleratorError as error:
            name = outcome.contestant.name
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


def judge(outcome: Measurement, allowed: Errors, yardstick: Measurement) -> None:
    """Our result is wrong unless each of its errors is within the limit."""
    if outcome.status != TIMED:
        return
    if not allowed:
        outcome.fail(UNJUDGED, f"the limit is {yardstick.contestant.name}'s to set: {yardstick.status}")
        return
    errors = outcome.errors or {}
    beyond = [f"error of {what} {errors.get(what, float('nan')):.2g}, allowed {most:.2g}"
              for what, most in allowed.items() if not errors.get(what, float("nan")) <= most]  # fmt: skip
    if beyond:
        outcome.fail(WRONG, "; ".join(beyond))


def compiled_rival(rival: Contestant) -> Contestant:
    # Rivals share their code between sizes, and torch.compile gives up on code after a few of them.
    torch.compiler.reset()
    run = torch.compile(rival.run, dynamic=False)
    return replace(rival, name=f"{rival.name}, compiled", run=run)


def is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's allocator of host memory raises a RuntimeError of these words.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].split(". ")[0][:300]
