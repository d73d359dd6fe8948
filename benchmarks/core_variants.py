"""TEMPORARY: which reader of the CUDA chunk kernel is the fastest. Correctness first, then medians with L2 flushed."""

import statistics

import torch
from pyprune import _core as core

SMS = torch.cuda.get_device_properties(0).multi_processor_count
FLUSH = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
NAMES = ("register 3 blocks", "cp.async ring", "bulk ring", "register 2 blocks")


def median_us(f, n=40):
    for _ in range(3):
        f()
    times = []
    for _ in range(n):
        FLUSH.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        times.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) * 1e3


def update(x, mean, m2, workspace, variant, count=0):
    name = str(x.dtype).removeprefix("torch.")
    core.channel_moments_cuda(
        x.data_ptr(), name, *x.shape, x.stride(0), count, mean.data_ptr(), m2.data_ptr(), workspace.data_ptr(),
        workspace.numel(), SMS, torch.cuda.current_stream().cuda_stream, variant,
    )  # fmt: skip


def main():
    print(torch.cuda.get_device_name(), SMS, "SMs", core.build_info())
    shapes = [
        (65536, 4096),
        (65536, 11008),
        (262144, 4096),
        (32768, 28672),
        (16384, 4096),
        (2048, 4096),
        (2048, 11008),
        (64, 4096),
        (65536, 256),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        for rows, channels in shapes:
            x = torch.randn(rows, channels, device="cuda", dtype=dtype)
            bytes_ = x.numel() * x.element_size()
            name = str(dtype).removeprefix("torch.")
            size = max(16, core.channel_moments_cuda_workspace(name, rows, channels, SMS))
            workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
            mean, m2 = torch.zeros(2, channels, device="cuda")
            half = x[: rows // 2]
            y = torch.empty_like(half)
            copy = median_us(lambda: y.copy_(half))  # reads and writes as many bytes as x has
            line = f"{name} {rows}x{channels}: copy {copy:.1f} us ({bytes_ / copy / 1e6:.2f} TB/s)"
            step = max(1, channels // 4)
            for variant, label in enumerate(NAMES):
                mean.fill_(float("nan"))
                m2.fill_(float("nan"))
                update(x, mean, m2, workspace, variant)
                for c in range(0, channels, step):
                    part = x[:, c : c + step : 7].double()
                    m = part.mean(0)
                    s = (part - m).square().sum(0)
                    assert (mean[c : c + step : 7] - m).abs().max() < 1e-4, (label, rows, channels)
                    assert ((m2[c : c + step : 7] - s) / s).abs().max() < 1e-4, (label, rows, channels)
                bits = (mean.clone(), m2.clone())
                update(x, mean, m2, workspace, variant)
                assert torch.equal(bits[0], mean)
                assert torch.equal(bits[1], m2)
                t = median_us(lambda v=variant: update(x, mean, m2, workspace, v))
                line += f" | {label} {t:.1f} us {bytes_ / t / 1e6:.2f} TB/s {copy / t:.3f}x copy"
            print(line, flush=True)


main()
