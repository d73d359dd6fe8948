"""RMSNorm in Triton: each row of x is read once and its result written once.

Rounds where transformers' modules do: the normalised row to x's type, and then its product with the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements that one program holds in registers, in float32: rows are taken together until they fill it. At 8 warps 32
# elements a thread; wider rows take more.
TILE = 8192
WARPS = 8


@triton.jit
def rms_norm_rows(
    x, weight, out, rows, channels, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """out [rows, channels] = bf16(x / sqrt(mean(x²) + eps)) · weight, or with PLUS_ONE bf16(x / … · (1 + weight))."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    places = row[:, None] * channels + channel[None, :]
    values = tl.load(x + places, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1) / channels
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    stored = tl.load(weight + channel, mask=channel < channels, other=0.0)
    if PLUS_ONE:
        product = wide * scale[:, None] * (1.0 + stored.to(tl.float32))[None, :]
    else:
        normed = (wide * scale[:, None]).to(values.dtype).to(OUT)
        product = normed.to(tl.float32) * stored.to(OUT).to(tl.float32)[None, :]
    tl.store(out + places, product.to(OUT), mask=inside)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool = False) -> torch.Tensor:
    """x: [rows, channels] contiguous, weight: [channels]. Result in the promoted type, with plus_one in x's."""
    rows, channels = x.shape
    dtype = x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = triton.next_power_of_2(channels)
    together = max(1, min(TILE // width, triton.next_power_of_2(rows)))
    element = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[out.dtype]
    rms_norm_rows[(triton.cdiv(rows, together),)](
        x,
        weight,
        out,
        rows,
        channels,
        eps,
        ROWS=together,
        CHANNELS=width,
        OUT=element,
        PLUS_ONE=plus_one,
        num_warps=WARPS,
    )
    return out
