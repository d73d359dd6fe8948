"""TEMPORARY: which geometry of the CUDA chunk kernel is the fastest.

    python benchmarks/core_candidates.py

Each candidate is compared with float64 and with itself (the same bits twice), then timed with L2 full of clean
lines, in turns with the other one and with a copy, so that a drift of the clocks meets all alike. Percentages are
of the rate at which a copy moves bytes. `host us`: one call of the binding, without PyTorch's dispatch.
"""

import math
import statistics
import time
from functools import partial

import pyprune._core as core
import torch
from moments import Timer, Update, fault_of
from torch import Tensor

CANDIDATES = (0, 1)
LARGE = [(65536, 4096), (262144, 4096), (65536, 11008), (32768, 28672)]
SMALL = [(2048, 4096), (63, 4096)]
ROUNDS = 5
DEVICE = torch.device("cuda", 0)
MULTIPROCESSORS = torch.cuda.get_device_properties(DEVICE).multi_processor_count


def random_input(rows: int, channels: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(rows, channels, dtype=torch.bfloat16, device=DEVICE, generator=generator)


def update_of(x: Tensor, candidate: int) -> Update:
    """One update by the candidate, its workspace poisoned and everything that can be known looked up."""
    rows, channels = x.shape
    size = core.channel_moments_cuda_workspace("bfloat16", rows, channels, MULTIPROCESSORS)
    workspace = torch.full((size // 4 + 4,), math.nan, device=DEVICE)
    stream = torch.cuda.current_stream().cuda_stream

    def update(count: int, mean: Tensor, m2: Tensor) -> None:
        core.channel_moments_cuda(
            x.data_ptr(), "bfloat16", rows, channels, channels, count, mean.data_ptr(), m2.data_ptr(),
            workspace.data_ptr(), size, MULTIPROCESSORS, stream, candidate,
        )  # fmt: skip

    return update


def check(x: Tensor, candidate: int) -> None:
    fault = fault_of(x, update_of(x, candidate))
    assert fault is None, f"candidate {candidate} on {list(x.shape)}: {fault}"
    results = []
    for _ in range(2):
        results.append(torch.full((2, x.shape[1]), math.nan, device=DEVICE))
        update_of(x, candidate)(0, *results[-1])
    assert torch.equal(*results), f"candidate {candidate} on {list(x.shape)}: other bits the second time"


def measure(rows: int, channels: int, timer: Timer) -> list[float]:
    """Prints one line; returns each candidate's fraction of the copy rate."""
    x = random_input(rows, channels)
    target = torch.empty_like(x)
    mean, m2 = torch.zeros(2, channels, device=DEVICE)
    calls = [partial(update_of(x, candidate), rows, mean, m2) for candidate in CANDIDATES]
    for candidate in CANDIDATES:
        check(x, candidate)
    copies: list[float] = []
    times: list[list[float]] = [[] for _ in CANDIDATES]
    for _ in range(ROUNDS):
        copies.append(timer(partial(target.copy_, x)).median / 2)  # it moves twice the bytes
        for values, call in zip(times, calls, strict=True):
            values.append(timer(call).median)
    copy = statistics.median(copies)
    line = f"{rows}x{channels}: half a copy {copy:.1f} us"
    for candidate, values in zip(CANDIDATES, times, strict=True):
        median = statistics.median(values)
        line += f" | candidate {candidate}: {median:.1f} us ({min(values):.1f} to {max(values):.1f}), "
        line += f"{copy / median:.1%} of copy"
    print(line, flush=True)
    return [copy / statistics.median(values) for values in times]


def host_microseconds(rows: int, channels: int, calls: int = 200) -> float:
    """Median time until one call returns, the device idle before each."""
    call = partial(update_of(random_input(rows, channels), 0), rows, *torch.zeros(2, channels, device=DEVICE))
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), MULTIPROCESSORS, "multiprocessors", core.build_info())
    timer = Timer(DEVICE, 30)
    fractions = [measure(*shape, timer) for shape in LARGE]
    for candidate, values in zip(CANDIDATES, zip(*fractions, strict=True), strict=True):
        print(f"candidate {candidate}: geometric mean {statistics.geometric_mean(values):.1%} of copy")
    for shape in SMALL:
        measure(*shape, timer)
        print(f"{shape[0]}x{shape[1]}: host us {host_microseconds(*shape):.1f}")
