"""`pyprune plan`: what a pruning would do and take, from headers and configuration; no weights are read."""

import time
from typing import Any

import torch

from .allocation import check_ratio, total_cost
from .architectures import ATTENTION, FFN, LayerShape
from .checkpoint import CheckpointReader
from .device import resident_peak
from .forward import micro_batch
from .methods import Method

_PROBE_SECONDS = 0.5


def estimate(
    reader: CheckpointReader,
    method: Method,
    ratio: float,
    samples: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Sizes before and after, FLOPs, seconds and peak memory of each pass.

    Sizes by layer are known beforehand for methods that are uniform over layers; others get the totals, and
    `layers` is null. Seconds are FLOPs over a measured matrix-product rate, plus nothing for the disk. Peak
    memory counts, on a CPU, the interpreter and libraries as they are now.
    """
    check_ratio(reader.shapes, ratio)
    before = sum(s.parameters for s in reader.shapes)
    removed = ratio * total_cost(reader.shapes) * 3 * reader.shapes[0].hidden_size
    layers = _uniform_layers(reader.shapes, method, ratio) if _uniform(method) else None
    passes = []
    rate = matmul_rate(device, dtype) if method.needs_text else 0.0
    flops = sum(forward_flops(s, samples, sequence_length) for s in reader.shapes)
    if method.needs_text:
        name = "prune" if method.sequential else "survey"
        # A sequential method runs each layer twice: dense for the statistics, pruned for the next layer's input.
        work = flops * (2 - ratio) if method.sequential else flops
        passes.append({"pass": name, "flops": work, "seconds": round(work / rate, 1)})
    return {
        "method": method.name,
        "options": method.options,
        "ratio": ratio,
        "parameters": {"decoder_linears": [before, before - round(removed)]},
        "bytes": [reader.bytes, reader.bytes - round(removed) * reader.dtype.itemsize],
        "layers": layers,
        "passes": passes,
        "peak_memory_bytes": peak_memory(reader, method, samples, sequence_length, device, dtype),
        "matmul_flops_per_second": rate,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _uniform(method: Method) -> bool:
    return not method.options.get("structure", "UL").startswith("AL")


def _uniform_layers(shapes: list[LayerShape], method: Method, ratio: float) -> list[dict[str, int]]:
    return [
        {
            "kv_groups": s.kv_groups - c[ATTENTION],
            "intermediate_channels": s.intermediate_channels - c[FFN],
        }
        for s, c in zip(shapes, method.counts(shapes, ratio), strict=True)
    ]


def forward_flops(shape: LayerShape, samples: int, sequence_length: int) -> float:
    """Multiply-adds of the linears, twice, and causal attention (half of the score matrix)."""
    tokens = samples * sequence_length
    heads = shape.kv_groups * shape.heads_per_group
    return tokens * (2 * shape.parameters + 2 * heads * shape.head_dim * sequence_length)


def peak_memory(
    reader: CheckpointReader,
    method: Method,
    samples: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Bytes: hidden states, one layer in the compute type and as stored, one micro-batch of its temporaries."""
    base = resident_peak() if device.type == "cpu" else 0
    layer = max(s.parameters for s in reader.shapes)
    stored = layer * reader.dtype.itemsize
    embeddings = reader.tensors[reader.family.embeddings].bytes
    if not method.needs_text:
        return base + max(stored * 2, embeddings)
    shape = max(reader.shapes, key=lambda s: s.intermediate_channels)
    hidden = samples * sequence_length * shape.hidden_size * dtype.itemsize
    tokens = micro_batch(device, sequence_length) * sequence_length
    # Of the FFN, gate, up, their activation and the product are alive at once; of the residual stream four copies.
    temporaries = tokens * (4 * shape.intermediate_channels + 4 * shape.hidden_size) * dtype.itemsize
    on_host = stored if device.type == "cpu" and dtype != reader.dtype else 0
    forward = hidden + layer * dtype.itemsize + on_host + temporaries
    rewriting = stored * 2 if device.type == "cpu" else 0
    return base + max(forward, embeddings, rewriting + (hidden if method.sequential else 0))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on the device, the best of a few in half a second."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, stop = float("inf"), time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < stop:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
