"""Channel moments: two updates from NaN-filled memory over odd shapes, strides and offsets."""

from collections.abc import Iterator

import pyprune._core as core
import torch

MULTIPROCESSORS = 3  # few, so that a small input already fills more than one wave


def update_is_right(rows: int, channels: int, stride: int, offset: int, weighted: bool, dtype: torch.dtype) -> bool:
    """Two updates with rows [rows, channels] at `offset` of NaN-filled memory, NaN-filled workspace."""
    memory = torch.full((offset + rows * stride,), float("nan"), dtype=dtype)
    memory.as_strided((rows, channels), (stride, 1), offset).copy_(torch.randn(rows, channels) + 1)
    on_device = memory.cuda()
    name = str(dtype).removeprefix("torch.")
    mean, m2 = torch.zeros(2, channels, device="cuda")
    roots = 2.0 ** torch.randint(-1, 2, (rows,), device="cuda") if weighted else torch.ones(rows, device="cuda")
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    size = core.channel_moments_cuda_workspace(name, rows, channels, MULTIPROCESSORS, weighted)
    workspace = torch.full((size // 4,), float("nan"), device="cuda")
    for count in (0, rows):
        core.channel_moments_cuda(
            on_device.data_ptr() + offset * memory.element_size(),
            name,
            rows,
            channels,
            stride,
            count,
            mean.data_ptr(),
            m2.data_ptr(),
            workspace.data_ptr(),
            size,
            MULTIPROCESSORS,
            torch.cuda.current_stream().cuda_stream,
            roots.data_ptr() if weighted else 0,
            total.data_ptr() if weighted else 0,
        )
        total += roots.double().square().sum()
    x = memory.as_strided((rows, channels), (stride, 1), offset).double()
    squares = roots.cpu().double().square()[:, None]
    exact_mean = (squares * x).sum(0) / squares.sum()
    exact_m2 = 2 * (squares * (x - exact_mean).square()).sum(0)
    return torch.allclose(mean.cpu().double(), exact_mean, atol=1e-3) and torch.allclose(
        m2.cpu().double(), exact_m2, rtol=1e-3, atol=1e-3
    )


def cases() -> Iterator[tuple[str, bool]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 8, 31, 65, 1003):
            for channels, stride, offset in (
                (8, 8, 0),
                (256, 256, 0),
                (520, 528, 8),
                (520, 520, 1),
                (67, 67, 0),
                (1, 1, 0),
                (1, 16, 5),
                (2056, 2056, 0),
            ):
                for weighted in (False, True):
                    case = (rows, channels, stride, offset, weighted, dtype)
                    yield f"moments {case}", update_is_right(*case)
