"""Selections of the residual stream in Triton: scatter-add, RMSNorm and gather; one program a row.

Rounds where the separate steps do: the sum to the residual's type, the normalised row to the same, and then its
product with the weight. A selection's channels are read again from the row, which the program has just read and its
caches still hold: registers cannot be addressed by channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A thread's share of a row, and of a selection at a time. So many warps hold rows of 512 to 16384 channels in 16
# registers a thread; wider ones take more registers, 32 warps being a program's most.
CHANNELS_PER_THREAD = 16
LANES_PER_THREAD = 8


@triton.jit
def selected(index, start, count, LANES: tl.constexpr):
    """(lane, lane < count, index[lane]) of the lanes from start on."""
    # One lane a thread: neighbouring threads then touch neighbouring channels, a warp few sectors. Where Triton knows
    # lanes to be contiguous a thread gets up to 8 of them, and each of its accesses is to another sector than its
    # neighbour's.
    lane = start + tl.max_contiguous(tl.multiple_of(tl.arange(0, LANES), 1), 1)
    inside = lane < count
    return lane, inside, tl.load(index + lane, mask=inside, other=0).to(tl.int32)


@triton.jit
def add_to_channels(row, update, index, count, LANES: tl.constexpr):
    """row[index] ← row[index] + update, of one row: `row` and `update` point to its first elements."""
    for start in tl.range(0, count, LANES):
        lane, inside, channel = selected(index, start, count, LANES)
        before = tl.load(row + channel, mask=inside)
        total = before.to(tl.float32) + tl.load(update + lane, mask=inside).to(tl.float32)
        tl.store(row + channel, total.to(before.dtype), mask=inside)


@triton.jit
def norm_channels(
    row, weight, out, index, channels, count, eps, CHANNELS: tl.constexpr, LANES: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    """out ← (row / sqrt(mean(row²) + eps)) · weight at index, of one row: `row`, `out` point to its first elements."""
    # Two dimensions: the compiler would give lanes of the same shape the layout of this wide read.
    every = tl.arange(0, CHANNELS)[None, :]
    wide = tl.load(row + every, mask=every < channels, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(wide * wide, axis=1), axis=0) / channels
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    for start in tl.range(0, count, LANES):
        lane, inside, channel = selected(index, start, count, LANES)
        values = tl.load(row + channel, mask=inside)
        normed = (values.to(tl.float32) * scale).to(values.dtype).to(OUT)
        factor = tl.load(weight + channel, mask=inside).to(OUT)
        product = normed.to(tl.float32) * factor.to(tl.float32)
        tl.store(out + lane, product.to(OUT), mask=inside)


@triton.jit
def rms_norm_gather_rows(
    x, weight, out, index, channels, count, eps, CHANNELS: tl.constexpr, LANES: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    """out [rows, count] ← RMSNorm of x [rows, channels] at index; both contiguous."""
    row = tl.program_id(0).to(tl.int64)
    norm_channels(x + row * channels, weight, out + row * count, index, channels, count, eps, CHANNELS, LANES, OUT)


@triton.jit
def scatter_add_rows(residual, update, index, channels, count, LANES: tl.constexpr):
    """residual [rows, channels] at index ← + update [rows, count]; both contiguous."""
    row = tl.program_id(0).to(tl.int64)
    add_to_channels(residual + row * channels, update + row * count, index, count, LANES)


@triton.jit
def scatter_add_rms_norm_gather_rows(
    residual, update, update_index, weight, out, index, channels, update_count, count, eps,
    CHANNELS: tl.constexpr, UPDATE_LANES: tl.constexpr, LANES: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """scatter_add_rows, then rms_norm_gather_rows of what it leaves."""
    row = tl.program_id(0).to(tl.int64)
    own = residual + row * channels
    add_to_channels(own, update + row * update_count, update_index, update_count, UPDATE_LANES)
    tl.debug_barrier()  # a thread reads what others have stored
    norm_channels(own, weight, out + row * count, index, channels, count, eps, CHANNELS, LANES, OUT)


def warps(channels: int) -> int:
    """Of a program, which has a row of so many channels."""
    return min(max(triton.next_power_of_2(channels) // (32 * CHANNELS_PER_THREAD), 1), 32)


def lanes(count: int, channels: int) -> int:
    """Channels of a selection that a program takes at a time."""
    return min(triton.next_power_of_2(count), 32 * warps(channels) * LANES_PER_THREAD)


def empty_selection(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, tl.dtype]:
    """Memory for the result of a norm, [rows, len(index)] in the promoted type, and that type in Triton."""
    out = torch.empty(len(x), len(index), dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    return out, {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[out.dtype]


def rms_norm_gather_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, index: torch.Tensor) -> torch.Tensor:
    """x: [rows, channels], weight: [channels], index: [n], all contiguous. Result: [rows, n] in the promoted type."""
    rows, channels = x.shape
    out, element = empty_selection(x, weight, index)
    count = len(index)
    rms_norm_gather_rows[(rows,)](
        x, weight, out, index, channels, count, eps,
        CHANNELS=triton.next_power_of_2(channels), LANES=lanes(count, channels), OUT=element, num_warps=warps(channels),
    )  # fmt: skip
    return out


def scatter_add_triton(residual: torch.Tensor, update: torch.Tensor, index: torch.Tensor) -> None:
    """residual: [rows, channels], changed; update: [rows, n], index: [n]; all contiguous."""
    rows, channels = residual.shape
    count = len(index)
    scatter_add_rows[(rows,)](
        residual, update, index, channels, count, LANES=lanes(count, channels), num_warps=warps(channels)
    )


def scatter_add_rms_norm_gather_triton(
    residual: torch.Tensor,
    update: torch.Tensor,
    update_index: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    index: torch.Tensor,
) -> torch.Tensor:
    """scatter_add_triton, then rms_norm_gather_triton of what it leaves."""
    rows, channels = residual.shape
    out, element = empty_selection(residual, weight, index)
    update_count, count = len(update_index), len(index)
    scatter_add_rms_norm_gather_rows[(rows,)](
        residual, update, update_index, weight, out, index, channels, update_count, count, eps,
        CHANNELS=triton.next_power_of_2(channels), UPDATE_LANES=lanes(update_count, channels),
        LANES=lanes(count, channels), OUT=element, num_warps=warps(channels),
    )  # fmt: skip
    return out
