"""Hessian: two updates between NaN-filled memory over odd shapes and strides, with and without sums and weights."""

from collections.abc import Iterator

import pyprune._core as core
import torch

MULTIPROCESSORS = 4  # two clusters: even a small input has chunks of a tile that wait for one another


def update_is_right(
    rows: int, channels: int, stride: int, lower_stride: int, sums: bool, weighted: bool, dtype: torch.dtype
) -> bool:
    """Two updates with rows [rows, channels] of NaN-filled memory, into a lower triangle of NaN-filled memory."""
    squares = torch.zeros(-(-rows // 64) * 64, device="cuda")  # of the weights; zeros up to a whole tile of rows
    squares[:rows] = 4.0 ** torch.randint(-1, 2, (rows,), device="cuda") if weighted else 1
    x = torch.full((rows, stride), float("nan"), dtype=dtype, device="cuda")
    x[:, :channels] = torch.randint(-2, 3, (rows, channels), device="cuda").to(dtype)
    lower = torch.full((channels, lower_stride), float("nan"), device="cuda")
    lower[:, :channels] = 0
    total = torch.zeros(channels, device="cuda")
    size = core.hessian_update_cuda_workspace(rows, channels, MULTIPROCESSORS)
    workspace = torch.full((size // 4,), float("nan"), device="cuda")
    for _ in range(2):
        core.hessian_update_cuda(
            x.data_ptr(),
            str(dtype).removeprefix("torch."),
            rows,
            channels,
            stride,
            lower.data_ptr(),
            lower_stride,
            total.data_ptr() if sums else 0,
            workspace.data_ptr(),
            size,
            MULTIPROCESSORS,
            torch.cuda.current_stream().cuda_stream,
            squares.data_ptr() if weighted else 0,
        )
    exact = x[:, :channels].double()
    scaled = exact * squares[:rows, None].double()
    same = torch.equal(lower[:, :channels].tril().double(), 2 * (exact.T @ scaled).tril())
    padding = bool(lower[:, channels:].isnan().all())
    return same and padding and torch.equal(total.double(), scaled.sum(0) * (2 if sums else 0))


def cases() -> Iterator[tuple[str, bool]]:
    if torch.cuda.get_device_capability() != (9, 0):
        return
    for dtype in (torch.bfloat16, torch.float16):
        for sums in (False, True):
            for rows, channels, stride, lower_stride in (
                (1, 8, 8, 8),
                (63, 72, 80, 76),
                (65, 256, 256, 256),
                (4000, 520, 528, 524),
            ):
                for weighted in (False, True):
                    case = (rows, channels, stride, lower_stride, sums, weighted, dtype)
                    yield f"hessian {case}", update_is_right(*case)
