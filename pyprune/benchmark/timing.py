"""Timing of single calls with cold caches, the way that every benchmark here does it.

Before each repetition the caches are filled by reading a large buffer: inputs are then cold, and no dirty line
waits to be written back at the candidate's expense. Device times come from CUDA events, enqueued while the
buffer is still being read, which hides the host's work; that is reported apart.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# 1 GiB: many times any L2, and long enough to read (0.25 ms at 4.3 TB/s) to hide a call's launches.
# On a CPU 256 MiB, past the last-level cache.
FLUSHED_BYTES = {"cuda": 2**30, "cpu": 2**28}
# Repetitions of a call that takes long, and the seconds from which on one will do: scatter is then below a percent.
LEAST_REPEAT = 3
ONCE_FROM = 5.0


@dataclass
class Timing:
    """Microseconds: quantiles of the repetitions, and the median time until the call returned."""

    median: float
    low: float
    high: float
    host: float
    repeat: int


def nothing() -> None:
    """Prepare nothing: for a call that has no state."""


class Timer:
    """Times a call on one device with cold caches."""

    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device = device
        self.repeat = repeat
        self.buffer = torch.ones(FLUSHED_BYTES[device.type] // 4, device=device)

    def __call__(self, call: Callable[[], object], prepare: Callable[[], object] = nothing) -> Timing:
        """Time `repeat` repetitions after a first one; `prepare` runs before each and is not timed."""
        prepare()
        call()
        return self.summary([self.once(call, prepare) for _ in range(self.repeat)])

    def within(self, seconds: float, call: Callable[[], object], prepare: Callable[[], object] = nothing) -> Timing:
        """Time repetitions for about `seconds`: at least LEAST_REPEAT, at most `repeat`. Nothing warms up."""
        times = [self.once(call, prepare)]
        self.synchronize()
        first = times[0][0]() * 1e-6
        count = 1 if first >= ONCE_FROM else max(LEAST_REPEAT, min(self.repeat, int(seconds / max(first, 1e-9))))
        times += [self.once(call, prepare) for _ in range(count - 1)]
        return self.summary(times)

    def once(
        self, call: Callable[[], object], prepare: Callable[[], object] = nothing
    ) -> tuple[Callable[[], float], float]:
        """One repetition: how to read its device time later, and the host's time."""
        prepare()
        if self.device.type != "cuda":
            self.buffer.sum()
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e6
            return lambda: elapsed, elapsed
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.sum()
        before.record()
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e6
        after.record()
        return lambda: before.elapsed_time(after) * 1e3, host

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def summary(self, times: Sequence[tuple[Callable[[], float], float]]) -> Timing:
        self.synchronize()
        device = sorted(read() for read, _ in times)
        low, high = device[0], device[-1]
        if len(device) > 1:
            deciles = statistics.quantiles(device, n=10, method="inclusive")
            low, high = deciles[0], deciles[-1]
        return Timing(statistics.median(device), low, high, statistics.median(host for _, host in times), len(device))
