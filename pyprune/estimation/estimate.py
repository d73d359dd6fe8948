"""`pyprune plan`: what a pruning would do and take, from headers and configuration; no weights are read."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..checkpoint import CheckpointReader
from ..forward.layer_forward import micro_batch
from ..mask_training.policy_learner import MASKS
from ..methods import LearnedMethod, Method, SecondOrderMethod, SemiStructuredMethod
from ..methods.second_order import CURVES, MOMENTS
from ..runtime.device import FREE_SHARE, resident_peak, usable_memory
from .memory import Sizes, plan_memory, sparsifying
from .time import GPU_RATES, MEMORY, TRAINING_SHARE, matmul_rate, measured_rates, pass_seconds
from .training_memory import check_fits, training_memory

# Pinned memory through which layers are read and written.
HOST_BUFFERS = 300 << 20


def estimate(
    reader: CheckpointReader,
    method: Method,
    ratio: float,
    samples: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    device_memory: int | None = None,
    named: str | None = None,
) -> dict[str, Any]:
    """Sizes before and after, FLOPs, seconds and bytes of each pass, peak memory of device and host.

    device: the one present; `named`, a key of time_model.GPU_RATES, is asked about in its place. On a GPU the seconds
    follow from `time_model`, the memory, which `device_memory` bytes bound, from `memory_plan`; on a CPU seconds are
    FLOPs over a measured rate of matrix products, and memory counts the interpreter and libraries as they are now.
    Waiting for the disk is in neither. Sizes by layer, and with them the parameters, are known beforehand where they
    follow from the ratio alone; otherwise `layers` is null and the ratio is taken as met. Raises InputError where the
    run would be refused.
    """
    method.check(reader.shapes, ratio)
    method.check_layers(reader.family, reader.config)
    layers = _known_layers(reader.shapes, method, ratio) if method.sizes_known and method.shrinks else None
    before = sum(s.parameters for s in reader.shapes)
    if layers is None:
        removed = round(ratio * before)
    else:
        kept = zip(reader.shapes, layers, strict=True)
        removed = before - sum(shape.kept(**own).parameters for shape, own in kept)
    after = reader.bytes - (removed * reader.dtype.itemsize if method.shrinks else 0)
    flops = pass_flops(reader.shapes, method, ratio, samples, sequence_length)
    learning = _learning(reader, method, sequence_length, device, dtype, device_memory, named)
    if learning is not None:
        flops["train"] = training_flops(reader.shapes, learning.method, sequence_length, learning.recompute)
    result: dict[str, Any] = {
        "method": method.name,
        "options": method.options,
        "ratio": ratio,
        "parameters": {"decoder_linears": [before, before - removed]},
        "bytes": [reader.bytes, after],
        "bytes_read": reader.bytes * (1 + ("calibration" in flops)),
        "bytes_written": after,
        "layers": layers,
        "zeros": not method.shrinks,
        "device": named or str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if named is None and device.type == "cpu":
        rate = matmul_rate(device, dtype) if method.needs_text else 0.0
        seconds = {name: work / rate for name, work in flops.items()}
        peak = peak_memory(reader, method, samples, sequence_length, device, dtype)
        if learning is not None:
            peak = max(peak, resident_peak() + learning.peak)
        result |= {"peak_memory_bytes": peak, "host_memory_bytes": peak}
    else:
        sizes = Sizes(reader.shapes, method, ratio, samples, sequence_length, dtype.itemsize, reader.dtype.itemsize)
        memory = plan_memory(sizes, device_memory or _whole_memory(device, named))
        rates = GPU_RATES[named] if named else measured_rates(device, dtype)
        seconds = pass_seconds(sizes, rates) if method.needs_text else {}
        by_pass = memory.device_bytes
        if learning is not None:
            seconds["train"] = flops["train"] / (TRAINING_SHARE[learning.method.backward] * rates.matmul)
            by_pass = by_pass | {"train": learning.peak}
        result |= {
            "peak_memory_bytes": max(memory.peak, *by_pass.values()),
            "peak_memory_by_pass": by_pass,
            "host_memory_bytes": resident_peak() + memory.host_bytes + HOST_BUFFERS,
            "windows_a_batch": memory.batch,
            "hidden_states": "device" if not memory.host_bytes else "host, in part" if memory.on_device else "host",
            "rates": asdict(rates),
        }
    if learning is not None:
        result["recomputed_activations"] = learning.recompute
    result["passes"] = [
        {"pass": name, "flops": work, "seconds": round(seconds[name], 1)} for name, work in flops.items()
    ]
    return result


@dataclass(frozen=True)
class _Learning:
    """Of a method that trains: what a step takes in bytes, and whether activations are computed twice for that."""

    method: LearnedMethod
    peak: int
    recompute: bool


def _learning(
    reader: CheckpointReader,
    method: Method,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    device_memory: int | None,
    named: str | None,
) -> _Learning | None:
    if not isinstance(method, LearnedMethod):
        return None
    memory = training_memory(reader, method, sequence_length, dtype)
    recompute = check_fits(memory, device_memory or _whole_memory(device, named), method.name)
    return _Learning(method, memory.peak(recompute), recompute)


def training_flops(shapes: list[LayerShape], method: LearnedMethod, sequence_length: int, recompute: bool) -> float:
    """FLOPs of all steps: forwards of the drawn masks, or a forward, the way back to the gates, and a forward again."""
    forward = method.steps * sum(forward_flops(shape, method.rows, sequence_length) for shape in shapes)
    return forward * ((3 if recompute else 2) if method.backward else MASKS)


def _whole_memory(device: torch.device, named: str | None) -> int:
    return int(FREE_SHARE * MEMORY[named]) if named else usable_memory(device)


def _known_layers(shapes: list[LayerShape], method: Method, ratio: float) -> list[dict[str, int]]:
    return [
        {
            "kv_groups": s.kv_groups - c[ATTENTION],
            "intermediate_channels": s.intermediate_channels - c[FFN],
        }
        for s, c in zip(shapes, method.removed_counts(shapes, ratio), strict=True)
    ]


def pass_flops(
    shapes: list[LayerShape], method: Method, ratio: float, samples: int, sequence_length: int
) -> dict[str, float]:
    """FLOPs of every pass that looks at the text: forwards, and second moments (one triangle)."""
    if not method.needs_text:
        return {}
    forward = sum(forward_flops(s, samples, sequence_length) for s in shapes)
    if isinstance(method, LearnedMethod) and method.backward:
        return {}  # the loss alone is looked at
    if not method.sequential:
        return {"calibration": forward}
    # A sequential method runs each layer twice: dense for the statistics, pruned for the next layer's input.
    passes = {"prune": forward * (2 - ratio if method.shrinks else 2)}
    if isinstance(method, SecondOrderMethod):
        tokens = samples * sequence_length
        widths = [s.units(m) * s.unit_width(m) for s in shapes for m in SUBLAYERS]
        hessians = sum(tokens * d**2 for d in widths)
        passes["prune"] += hessians
        if method.correction:  # the dense stream, and the stream error's moments with the inputs
            passes["prune"] += forward + sum(2 * tokens * shapes[0].hidden_size * d for d in widths)
        if method.alignment:  # second moments of what both norms put out, and of its change
            passes["prune"] += 2 * len(shapes) * 3 * tokens * shapes[0].hidden_size ** 2
        if method.dense_statistics == CURVES:
            share = min(1.0, method.allocation_windows / samples)  # of the windows
            passes = {"calibration": share * (forward + hessians)} | passes
        elif method.dense_statistics == MOMENTS:
            passes = {"calibration": forward} | passes
    if isinstance(method, SemiStructuredMethod) and method.from_hessian:
        passes["prune"] += sum(samples * sequence_length * d**2 for s in shapes for d in s.input_widths)
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
    """Bytes on a CPU: hidden states, one layer in the compute type and as stored, a micro-batch of its temporaries."""
    base = resident_peak()
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
    on_host = stored if dtype != reader.dtype else 0
    forward = hidden + layer * dtype.itemsize + on_host + temporaries
    if isinstance(method, SecondOrderMethod):
        width = max(s.units(m) * s.unit_width(m) for s in reader.shapes for m in SUBLAYERS)
        # H, its inverse and the weights' products; the factor of what is removed; weights before and after in float32.
        solving = (3 * width**2 + width * width // 2 + 4 * shape.hidden_size * width) * 4
        streams = 2 * hidden if method.correction else hidden
        return base + max(forward - hidden + streams, streams + layer * dtype.itemsize + on_host + solving)
    if isinstance(method, SemiStructuredMethod):
        return base + forward + sparsifying(shape, method.from_hessian)
    return base + max(forward, embeddings, stored * 2 + (hidden if method.sequential else 0))
