"""Rotary position embedding in Triton, in place: every head of x is read once and written once.

The halves of a head are the two parts that turn (Llama's order), or its even and odd channels (GLM's). Rounds where
transformers' functions do: each of the two products to x's type, and then their sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 16  # heads that a program turns at a time: at 128 wide 2048 elements, 16 a thread
WARPS = 4


@triton.jit
def rotate_heads(
    x, cos, sin, tokens, heads, head_dim, x_batch, x_token, x_head, angle_batch, angle_token,
    HEADS: tl.constexpr, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """x[b, t, h] ← x cos + (−second part, first part) sin; one program: one token of one sequence, HEADS heads."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    half = head_dim // 2
    narrow = channel < half
    inside = (head < heads)[:, None] & narrow[None, :]
    angles = batch * angle_batch + token * angle_token + channel
    places = x + batch * x_batch + token * x_token + head[:, None] * x_head
    if NEIGHBOURS:
        places, apart, angles_apart = places + 2 * channel[None, :], 1, 0
    else:
        places, apart, angles_apart = places + channel[None, :], half, half
    first, second = tl.load(places, mask=inside), tl.load(places + apart, mask=inside)
    element = first.dtype
    first_cos = tl.load(cos + angles, mask=narrow).to(tl.float32)[None, :]
    first_sin = tl.load(sin + angles, mask=narrow).to(tl.float32)[None, :]
    second_cos = tl.load(cos + angles + angles_apart, mask=narrow).to(tl.float32)[None, :]
    second_sin = tl.load(sin + angles + angles_apart, mask=narrow).to(tl.float32)[None, :]
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned_first = (a * first_cos).to(element).to(tl.float32) + (-b * first_sin).to(element).to(tl.float32)
    turned_second = (b * second_cos).to(element).to(tl.float32) + (a * second_sin).to(element).to(tl.float32)
    tl.store(places, turned_first.to(element), mask=inside)
    tl.store(places + apart, turned_second.to(element), mask=inside)


def rotate_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neighbours: bool = False) -> None:
    """x: [batch, heads, tokens, head_dim], in place, its last stride 1; cos, sin: [1 or batch, tokens, head_dim]."""
    batch, heads, tokens, head_dim = x.shape
    rotate_heads[(batch * tokens, triton.cdiv(heads, HEADS))](
        x,
        cos,
        sin,
        tokens,
        heads,
        head_dim,
        x.stride(0),
        x.stride(2),
        x.stride(1),
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1),
        HEADS=HEADS,
        HALF=triton.next_power_of_2(head_dim // 2),
        NEIGHBOURS=neighbours,
        num_warps=WARPS,
    )
