"""Time of the stages of a pass on a GPU, from sizes and three rates of the device.

Each term is the work of one stage over the rate that bounds it. Shares of the rates were measured on an H200 with 13 B
and 70 B shapes; what no stage names (waiting for decisions, the first use of each kernel) is in OVERHEAD.
"""

import difflib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..architectures import ATTENTION, FFN
from ..errors import InputError
from .sizes import Sizes

OVERHEAD = 1.1
# Shares of the rate of matrix products: H (one triangle, 2·T·d²/2 FLOP), split products in TF32 (per d³ or n·d²).
# Elimination is thrice as fast in one TF32 product, as for curves.
HESSIAN_SHARE, INVERSE_SHARE, ELIMINATE_SHARE, SPLIT_SHARE = 0.9, 1 / 11, 1 / 30, 1 / 5
CURVE_SHARE = 3 * ELIMINATE_SHARE
ATTENTION_SHARE = 0.5
# Steps of a masked model in PyTorch (7B, 2048 tokens, H100): forward and back, and forwards alone.
TRAINING_SHARE = {True: 0.32, False: 0.57}
PIVOT_SECONDS = 8e-6  # one channel's removal within a panel
WALK_SECONDS = 4e-6  # a column of SparseGPT's walk, with its share of what surrounds a block
GROUP_SECONDS = 1.5e-3  # one KV group's, a dozen products one after the other
PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Rates:
    """Rates of a device: FLOP/s of products in the compute type and in float32, bytes/s of a copy (read + write)."""

    matmul: float
    float32: float
    memory: float


# Measured on an H200; for the others scaled by the makers' figures for dense bfloat16, float32 and bandwidth (B200: as
# in an HGX, 2250 and 75 TFLOP/s, 8 TB/s; RTX 5090: 210 and 105 TFLOP/s, 1.8 TB/s).
GPU_RATES = {
    "a100": Rates(2.5e14, 1.7e13, 1.7e12),
    "h100": Rates(7.2e14, 4.7e13, 2.8e12),
    "h200": Rates(7.5e14, 4.7e13, 4.0e12),
    "b200": Rates(1.7e15, 5.2e13, 6.6e12),
    "l40s": Rates(2.6e14, 5.0e13, 0.75e12),
    "rtx4090": Rates(1.6e14, 5.0e13, 0.9e12),
    "rtx5090": Rates(2.0e14, 6.3e13, 1.6e12),
}
MEMORY = {
    "a100": 80e9, "h100": 80e9, "h200": 141e9, "b200": 180e9, "l40s": 48e9, "rtx4090": 24e9, "rtx5090": 32e9,
}  # fmt: skip  # bytes
# How other makers' names begin: AMD's, Intel's and Google's.
NO_BACKEND = ("mi", "rx", "gaudi", "tpu")


def gpu_named(name: str) -> str:
    """The key of GPU_RATES that a name spells: "RTX 4090", "nvidia-h100". InputError: its rates are not known."""
    word = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")
    if word in GPU_RATES:
        return word
    known = ", ".join(GPU_RATES)
    if word.startswith(NO_BACKEND):
        raise InputError(f"{name}: no backend runs on it, only on NVIDIA GPUs and CPUs; known: {known}")
    near = difflib.get_close_matches(word, GPU_RATES, n=1)
    raise InputError(f"{name}: no GPU whose rates are known{f'; did you mean {near[0]}?' if near else ''} ({known})")


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a CUDA device that is present, in about a second."""
    x = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = 2 * len(x) / best_seconds(lambda: y.copy_(x), device)
    return Rates(matmul_rate(device, dtype), matmul_rate(device, torch.float32), copy)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on the device, the best of a few."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    best, stop = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def sublayer_seconds(sizes: Sizes, sublayer: str, tokens: int, rates: Rates) -> float:
    """Seconds of a sublayer of the widest layer over `tokens`: products, attention, elementwise passes."""
    shape = sizes.shape
    hidden = shape.hidden_size
    inner = sizes.width(sublayer)
    if sublayer == FFN:
        flops = tokens * 2 * 3 * hidden * inner
        moved = tokens * (10 * hidden + 10 * inner)  # norm, residual; activation and product
        attention = 0.0
    else:
        keys = shape.kv_groups * shape.head_dim
        flops = tokens * 2 * hidden * (2 * inner + 2 * keys)
        moved = tokens * (10 * hidden + 4 * (inner + keys))  # norm, residual; rotation of queries and keys
        attention = tokens * 2 * inner * sizes.sequence_length / (ATTENTION_SHARE * rates.matmul)
    return flops / rates.matmul + attention + moved * sizes.compute_bytes / 2 / rates.memory


def output_proj_seconds(
    sizes: Sizes, sublayer: str, tokens: int, removed: float, rates: Rates, eliminate_share: float = ELIMINATE_SHARE
) -> dict[str, float]:
    """Seconds by stage of one output projection: statistics over `tokens` tokens, and removal of a share of units."""
    d, out = sizes.width(sublayer), sizes.shape.hidden_size
    units = d // sizes.shape.unit_width(sublayer)
    each = PIVOT_SECONDS if sublayer == FFN else GROUP_SECONDS
    eliminated = removed * d * d * d / (eliminate_share * rates.matmul) + removed * units * each
    return {
        "hessian": tokens * d * d / (HESSIAN_SHARE * rates.matmul),
        "stream error": 2 * tokens * out * d / rates.matmul + 10 * tokens * out / rates.memory,
        "inverse": d**3 / (INVERSE_SHARE * rates.matmul * d / (d + 6000)),
        "eliminate": eliminated,
        "gram": out * d * d / (SPLIT_SHARE / 2 * rates.matmul),
        "fit": 2 * out * d * d / (SPLIT_SHARE * rates.matmul) + removed * d * d * out / rates.float32,
    }


def sparsifying_seconds(sizes: Sizes, tokens: int, rates: Rates) -> float:
    """Second moments of a layer's four inputs, the factors of their inverses, and the walks over all columns."""
    shape, seconds = sizes.shape, 0.0
    keys = 2 * shape.kv_groups * shape.head_dim
    outputs = (sizes.width(ATTENTION) + keys, shape.hidden_size, 2 * shape.intermediate_channels, shape.hidden_size)
    for d, out in zip(shape.input_widths, outputs, strict=True):
        seconds += out * d * d / (SPLIT_SHARE * rates.matmul)  # each block's error, propagated to later columns
        seconds += 2 * out * d * d / rates.float32  # the energy that losses are shares of
        seconds += tokens * d * d / (HESSIAN_SHARE * rates.matmul)
        seconds += 2 / 3 * d**3 / (INVERSE_SHARE * rates.matmul * d / (d + 6000)) + d * WALK_SECONDS
    return seconds
