"""Where the device's time goes in a few layers of a prune pass: its busy share and the kernels that take most."""

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FIRST, LAST = 2, 4  # layers: past what is done once, and few, since a trace grows by the megabyte
TOP = 15  # kernels named
Interval = tuple[str, int, int]  # name, start and end in nanoseconds


class LayerProfile:
    """Profiles the layers FIRST to LAST of the prune pass; `progress` is to be told of every step.

    On a CPU PyTorch's operators stand in for kernels; they nest, so only the busy share counts there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.document: dict[str, Any] | None = None
        self._profiler: profile | None = None
        self._start = 0.0

    def progress(self, what: str, done: int, total: int) -> None:
        if what != "prune":
            return
        if done == FIRST and done < total:
            activities = [ProfilerActivity.CPU] if self.device.type == "cpu" else [ProfilerActivity.CUDA]
            self._wait()
            self._profiler = profile(activities=activities)
            self._profiler.start()
            self._start = time.perf_counter()
        elif self._profiler is not None and done in (LAST + 1, total):
            self._wait()
            seconds = time.perf_counter() - self._start
            self._profiler.stop()
            self.document = {"layers": [FIRST, done - 1]} | summary(self._intervals(self._profiler), seconds)
            self._profiler = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _intervals(self, profiler: profile) -> list[Interval]:
        wanted = self.device.type.upper()
        results: Any = profiler.profiler
        return [
            (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in results.kineto_results.events()
            if event.device_type().name == wanted and not event.is_user_annotation()
        ]


def summary(intervals: Iterable[Interval], seconds: float) -> dict[str, Any]:
    """The share of `seconds` in which anything ran, the names that ran longest, those before which it idled most."""
    busy, reached = 0, 0
    idle: dict[str, float] = defaultdict(float)
    of_name: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, start, end in sorted(intervals, key=lambda interval: interval[1]):
        busy += max(0, end - max(start, reached))
        if reached and start > reached:
            idle[name] += (start - reached) * 1e-9
        reached = max(reached, end)
        of_name[name] += (end - start) * 1e-9
        calls[name] += 1
    waited = sorted(idle, key=idle.__getitem__, reverse=True)[:TOP]
    longest = sorted(of_name, key=of_name.__getitem__, reverse=True)[:TOP]
    return {
        "seconds": seconds,
        "busy_share": busy * 1e-9 / seconds,
        "kernels": [{"name": name[:120], "seconds": of_name[name], "calls": calls[name]} for name in longest],
        "idle_before": [{"name": name[:120], "seconds": idle[name]} for name in waited],
    }
