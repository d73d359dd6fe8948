"""TEMPORARY: which reader of the CUDA chunk kernel is the fastest.

Correctness first (against float64, and the same bits twice), then medians of 40 with L2 flushed.
"""

import statistics
from collections.abc import Callable

import pyprune._core as core
import torch
from torch import Tensor

SMS = torch.cuda.get_device_properties(0).multi_processor_count
FLUSH = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
NAMES = ("register 3 blocks", "cp.async ring", "bulk ring", "register 2 blocks")
SHAPES = [(65536, 4096), (65536, 11008), (262144, 4096), (32768, 28672), (16384, 4096), (2048, 4096)]
SHAPES += [(2048, 11008), (256, 4096), (63, 4096), (64, 4096), (65536, 256)]


def median_us(call: Callable[[], object], repeats: int = 40) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        FLUSH.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times) * 1e3


def measure(rows: int, channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, channels, device="cuda", dtype=dtype)
    size = x.numel() * x.element_size()
    name = str(dtype).removeprefix("torch.")
    needed = max(16, core.channel_moments_cuda_workspace(name, rows, channels, SMS))
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    mean, m2 = torch.zeros(2, channels, device="cuda")

    def update(variant: int) -> None:
        core.channel_moments_cuda(
            x.data_ptr(),
            name,
            rows,
            channels,
            channels,
            0,
            mean.data_ptr(),
            m2.data_ptr(),
            workspace.data_ptr(),
            needed,
            SMS,
            torch.cuda.current_stream().cuda_stream,
            variant,
        )

    def check(variant: int) -> None:
        mean.fill_(float("nan"))
        m2.fill_(float("nan"))
        workspace.view(torch.float32).fill_(float("nan"))
        update(variant)
        first = (mean.clone(), m2.clone())
        columns = torch.cat([torch.arange(0, channels, 37), torch.arange(max(0, channels - 16), channels)]).cuda()
        part: Tensor = x[:, columns].double()
        exact_mean = part.mean(0)
        exact_m2 = (part - exact_mean).square().sum(0)
        assert (mean[columns] - exact_mean).abs().max() < 1e-4, (NAMES[variant], rows, channels)
        assert ((m2[columns] - exact_m2) / exact_m2).abs().max() < 1e-4, (NAMES[variant], rows, channels)
        update(variant)
        assert torch.equal(first[0], mean)
        assert torch.equal(first[1], m2)

    source = x[: rows // 2]
    target = torch.empty_like(source)
    copy = median_us(lambda: target.copy_(source))  # reads and writes as many bytes as x has
    line = f"{name} {rows}x{channels}: copy {copy:.1f} us {size / copy / 1e6:.2f} TB/s"
    for variant, label in enumerate(NAMES):
        check(variant)
        time = median_us(lambda variant=variant: update(variant))
        line += f" | {label} {time:.1f} us {size / time / 1e6:.2f} TB/s {copy / time:.3f} of copy"
    print(line, flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), SMS, "multiprocessors", core.build_info())
    for element in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            measure(*shape, element)
