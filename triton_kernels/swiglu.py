"""The middle of a gated FFN in Triton, gate ← silu(gate) · up, in place: each is read once, the product written once.

Rounds where transformers' modules do: silu(gate) to the type of gate, and then the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # elements a program: at 8 warps 16 a thread, two reads of 16 bytes of each
WARPS = 8


@triton.jit
def swiglu_elements(gate, up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(gate + place, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(value.dtype)
    factor = tl.load(up + place, mask=inside, other=0.0)
    tl.store(gate + place, (activated.to(tl.float32) * factor.to(tl.float32)).to(value.dtype), mask=inside)


def swiglu_triton(gate: torch.Tensor, up: torch.Tensor) -> None:
    """gate, up: contiguous, of one shape and type; gate is changed."""
    count = gate.numel()
    swiglu_elements[(triton.cdiv(count, BLOCK),)](gate, up, count, BLOCK=BLOCK, num_warps=WARPS)
