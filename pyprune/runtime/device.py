"""Device, compute type and memory of a run."""

import gc
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from ..errors import InputError

# Share of a GPU's free memory that a run takes by default.
FREE_SHARE = 0.9

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; one of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device {name!r}: no CUDA device here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {name!r}: only {torch.cuda.device_count()} CUDA device(s) here")
        device = torch.device("cuda", device.index or 0)
    return device


def select_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` computes in float32 on a CPU (bfloat16 is slow there) and in the stored type on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}; one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation could take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_memory(device: torch.device) -> int:
    """Bytes that a run may take of the device: of a CPU's all, of a GPU's what is free beside what the caller holds."""
    if device.type == "cuda":
        release_cache(device)
        return int(FREE_SHARE * free_memory(device))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release_cache(device: torch.device) -> None:
    """Give back what PyTorch holds of a CUDA device for tensors that are gone, those in cycles too.

    The workspaces of cuBLAS stay: a CUDA graph of the caller may have their addresses.
    """
    gc.collect()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()


@contextmanager
def memory_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Limit PyTorch to `limit` bytes of a CUDA device beyond those of the caller's tensors, within the context.

    None: no limit. OutOfMemoryError beyond it, InputError where the caller's tensors leave no room for so much.
    """
    if limit is None:
        yield
        return
    release_cache(device)
    # PyTorch limits what the process holds, and whole segments: a small tensor of the caller's keeps 2 or 20 MiB.
    held = torch.cuda.memory_reserved(device)
    check_room(device, limit, held, free_memory(device))
    total = torch.cuda.get_device_properties(device).total_memory
    own = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(own, (held + limit) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(own, device)


def check_room(device: torch.device, limit: int, held: int, free: int) -> None:
    """InputError where `limit` bytes would be free, were it not for the `held` ones of this process.

    More than the device has at all is no more than all of it.
    """
    if free < limit <= free + held:
        raise InputError(
            f"{device}: {limit / 1e9:.1f} GB were asked for, and {free / 1e9:.1f} GB are free beside the "
            f"{held / 1e9:.1f} GB that this process holds; free some of its tensors, or ask for less device memory"
        )


def oom_summary(error: torch.OutOfMemoryError) -> str:
    """The first sentence of PyTorch's paragraph."""
    return str(error).split(". ")[0]


class LayerSummary(TypedDict):
    """Seconds and peak memory of a pass at one layer."""

    seconds: float
    peak_memory_bytes: int


class PassSummary(TypedDict):
    """Seconds and peak memory of a pass, seconds by stage, and both by layer."""

    seconds: float
    peak_memory_bytes: int
    stages: dict[str, float]
    layers: list[LayerSummary]


@dataclass
class Meter:
    """Seconds and peak memory of a pass and of each of its layers, and seconds by stage (`stage`).

    Peak memory is the device's on CUDA (PyTorch's allocations); on a CPU the process's resident set, base of the
    interpreter and libraries included. Linux lets a process reset its own high-water mark; where that is
    refused, the peak of a layer is the peak so far.
    """

    device: torch.device
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    layers: list[LayerSummary] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    _marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done within to a stage. On CUDA between two marks on the stream, so that nothing waits; they
        are read at the end of the layer."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.device)
        first.record(stream)
        yield
        last.record(stream)
        self._marks.append((name, first, last))

    @contextmanager
    def layer(self) -> Iterator[None]:
        self._reset()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            for name, first, last in self._marks:
                self.stages[name] = self.stages.get(name, 0.0) + first.elapsed_time(last) * 1e-3
            self._marks.clear()
        seconds, peak = time.perf_counter() - start, self._peak()
        self.layers.append({"seconds": round(seconds, 4), "peak_memory_bytes": peak})
        self.seconds += seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access("/proc/self/clear_refs", os.W_OK):
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak()

    def summary(self) -> PassSummary:
        return {
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "stages": {name: round(seconds, 4) for name, seconds in self.stages.items()},
            "layers": self.layers,
        }


def resident_peak() -> int:
    """High-water mark of this process's resident memory, bytes."""
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
