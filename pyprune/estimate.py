"""`pyprune plan`: what a pruning would do and take, from headers and configuration; no weights are read."""

import time
from typing import Any

import torch

from .allocation import check_ratio, total_cost
from .architectures import ATTENTION, FFN, MODULES, LayerShape
from .checkpoint import CheckpointReader
from .device import resident_peak
from .forward import micro_batch
from .methods import Method, SecondOrderMethod
from .methods.second_order import CURVES, MOMENTS

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

    Sizes by layer are known beforehand where they follow from the ratio alone; otherwise `layers` is null. Seconds
    are FLOPs over a measured matrix-product rate, plus nothing for the disk and the choice. Peak memory counts, on a
    CPU, the interpreter and libraries as they are now.
    """
    check_ratio(reader.shapes, ratio)
    before = sum(s.parameters for s in reader.shapes)
    removed = ratio * total_cost(reader.shapes) * 3 * reader.shapes[0].hidden_size
    layers = _known_layers(reader.shapes, method, ratio) if method.predetermined else None
    rate = matmul_rate(device, dtype) if method.needs_text else 0.0
    passes = [
        {"pass": name, "flops": work, "seconds": round(work / rate, 1)}
        for name, work in pass_flops(reader.shapes, method, ratio, samples, sequence_length).items()
    ]
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


def _known_layers(shapes: list[LayerShape], method: Method, ratio: float) -> list[dict[str, int]]:
    return [
        {
            "kv_groups": s.kv_groups - c[ATTENTION],
            "intermediate_channels": s.intermediate_channels - c[FFN],
        }
        for s, c in zip(shapes, method.counts(shapes, ratio), strict=True)
    ]


def pass_flops(
    shapes: list[LayerShape], method: Method, ratio: float, samples: int, sequence_length: int
) -> dict[str, float]:
    """FLOPs of every pass that looks at the text: forwards, and second moments (one triangle)."""
    if not method.needs_text:
        return {}
    forward = sum(forward_flops(s, samples, sequence_length) for s in shapes)
    if not method.sequential:
        return {"survey": forward}
    # A sequential method runs each layer twice: dense for the statistics, pruned for the next layer's input.
    passes = {"prune": forward * (2 - ratio)}
    if isinstance(method, SecondOrderMethod):
        tokens = samples * sequence_length
        widths = [s.units(m) * s.unit_width(m) for s in shapes for m in MODULES]
        hessians = sum(tokens * d**2 for d in widths)
        passes["prune"] += hessians
        if method.correction:  # the dense stream, and the shortfall's moments with the inputs
            passes["prune"] += forward + sum(2 * tokens * shapes[0].hidden_size * d for d in widths)
        if method.alignment:  # second moments of what both norms put out, and of its change
            passes["prune"] += 2 * len(shapes) * 3 * tokens * shapes[0].hidden_size ** 2
        if method.survey == CURVES:
            passes = {"survey": forward + hessians} | passes
        elif method.survey == MOMENTS:
            passes = {"survey": forward} | passes
    return passes


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
    if isinstance(method, SecondOrderMethod):
        width = max(s.units(m) * s.unit_width(m) for s in reader.shapes for m in MODULES)
        # H, its inverse and the weights' products; the factor of what is removed; weights before and after in float32.
        solving = (3 * width**2 + width * width // 2 + 4 * shape.hidden_size * width) * 4
        streams = 2 * hidden if method.correction else hidden
        return base + max(forward - hidden + streams, streams + layer * dtype.itemsize + on_host + solving)
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
