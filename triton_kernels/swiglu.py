"""The middle of a gated FFN in Triton, gate ← f(gate) · up, in place: each is read once, the product written once.

Rounds where transformers' modules do: f(gate) to the type of gate, and then the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # elements a program: at 8 warps 16 a thread, two reads of 16 bytes of each
WARPS = 8


@triton.jit
def swiglu_elements(
    gate, up, channels, blocks, gate_row, up_row, BLOCK: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    """One program: BLOCK channels of one row; gate_row, up_row: elements from row to row. `blocks` a row."""
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    place = gate + row * gate_row + channel
    value = tl.load(place, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    if GELU:
        # x/2 · (1 + tanh(z)) = x · σ(2z), z = √(2/π) (x + 0.044715 x³)
        doubled = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        activated = (wide / (1.0 + tl.exp(-doubled))).to(value.dtype)
    else:
        activated = (wide / (1.0 + tl.exp(-wide))).to(value.dtype)
    factor = tl.load(up + row * up_row + channel, mask=inside, other=0.0)
    tl.store(place, (activated.to(tl.float32) * factor.to(tl.float32)).to(value.dtype), mask=inside)


def swiglu_triton(gate: torch.Tensor, up: torch.Tensor, gelu: bool = False) -> None:
    """gate, up: [rows, channels] of one shape and type, neighbouring channels; gate is changed. gelu: f, else silu."""
    rows, channels = gate.shape
    blocks = triton.cdiv(channels, BLOCK)
    swiglu_elements[(rows * blocks,)](
        gate, up, channels, blocks, gate.stride(0), up.stride(0), BLOCK=BLOCK, GELU=gelu, num_warps=WARPS
    )
