"""Timing of single calls with cold caches, the way that every benchmark here does it.

Before each repetition the caches are filled by reading a large buffer: inputs are then cold, and no dirty line
waits to be written back at the contestant's expense. Device times come from CUDA events, enqueued while the
buffer is still being read, which hides the host's work; that is reported apart.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Microseconds: quantiles of the repetitions, and the median time until the call returned."""

    median: float
    low: float
    high: float
    host: float


class Timer:
    """Times a call on one device with cold caches."""

    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device = device
        self.repeat = repeat
        # 1 GiB: many times any L2, and long enough to read (0.25 ms at 4.3 TB/s) to hide a call's launches.
        # On a CPU 256 MiB, past the last-level cache.
        size = 2**30 if device.type == "cuda" else 2**28
        self.buffer = torch.ones(size // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> Timing:
        call()
        times = [self.once(call) for _ in range(self.repeat)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        device = sorted(read() for read, _ in times)
        deciles = statistics.quantiles(device, n=10, method="inclusive")
        return Timing(statistics.median(device), deciles[0], deciles[-1], statistics.median(t for _, t in times))

    def once(self, call: Callable[[], object]) -> tuple[Callable[[], float], float]:
        """One repetition: how to read its device time later, and the host's time."""
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
