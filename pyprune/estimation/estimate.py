"""`pyprune plan`: what a pruning would do and take, from headers and configuration; no weights are read."""

from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

import torch

from ..architectures import ATTENTION, FFN, LayerShape
from ..checkpoint import CheckpointReader
from ..forward.layer_forward import micro_batch
from ..methods import Method
from ..methods.base import Training
from ..methods.inside import check_inside
from ..runtime.device import FREE_SHARE, resident_peak, usable_memory
from .memory import plan_memory
from .procedures import CpuRun, TrainCost, costs_of
from .sampling import SamplingCost, cache_budget
from .sizes import Sizes
from .time import GPU_RATES, MEMORY, matmul_rate, measured_rates
from .training_memory import check_fits, training_memory

# Pinned memory through which layers are read and written.
HOST_BUFFERS = 300 << 20
# Bytes a second: the disk of the measured runs (docs/speed.md).
READ_RATE = 1.6e9


# "pass" is no name of an attribute.
PassEstimate = TypedDict("PassEstimate", {"pass": str, "flops": float, "seconds": float})


class LinearParameters(TypedDict):
    """Parameters of the decoder linears before and after."""

    decoder_linears: list[int]


class LayerSizes(TypedDict):
    """Units that a layer keeps."""

    kv_groups: int
    intermediate_channels: int


class Reading(TypedDict):
    """Bytes read in all, and seconds at a rate."""

    bytes: int
    seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Estimate:
    """Prediction of what a pruning does and takes.

    method, options, ratio: what was asked. parameters, bytes: before and after. bytes_read, bytes_written: of files.
    reading: the time that it takes, while passes compute.
    layers: sizes by layer; None where they follow from the text. zeros: weights become zero, and every shape stays.
    passes: FLOPs and seconds of each. peak_memory_bytes: of the device. The rest is of a GPU only, else None:
    peak_memory_by_pass, windows_a_batch, hidden_states (where they lie) and rates (what seconds are computed from).
    recomputed_activations: of methods that train, whether the backward pass computes activations again.
    """

    method: str
    options: dict[str, Any]
    ratio: float
    parameters: LinearParameters
    bytes: list[int]
    bytes_read: int
    bytes_written: int
    reading: Reading
    layers: list[LayerSizes] | None
    zeros: bool
    device: str
    dtype: str
    peak_memory_bytes: int
    host_memory_bytes: int
    passes: list[PassEstimate]
    peak_memory_by_pass: dict[str, int] | None = None
    windows_a_batch: int | None = None
    hidden_states: str | None = None
    rates: dict[str, float] | None = None
    recomputed_activations: bool | None = None

    @property
    def seconds(self) -> float:
        """Of all passes; waiting for the disk is not in it."""
        return sum(step["seconds"] for step in self.passes)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `pyprune estimate --json` prints."""
        stored = {field.name: getattr(self, field.name) for field in fields(self)}
        optional = {field.name for field in fields(self) if field.default is None}
        return {name: value for name, value in stored.items() if name not in optional or value is not None}


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
    sampled: int = 0,
) -> Estimate:
    """Sizes before and after, FLOPs, seconds and bytes of each pass, peak memory of device and host.

    device: the one present; `named`, a key of `time.GPU_RATES`, is asked about in its place. On a GPU the seconds
    follow from `procedures`, the memory, which `device_memory` bytes bound, from `memory`; on a CPU seconds are
    FLOPs over a measured rate of matrix products, and memory counts the interpreter and libraries as they are now.
    `sampled`: windows that the model writes itself, which is a pass of its own. `reading` has the bytes read in all and
    their seconds at READ_RATE; the passes compute meanwhile. Sizes by layer, and with them the parameters, are known
    beforehand where they follow from the ratio alone; otherwise `layers` is null and the ratio is taken as met. Raises
    InputError where the run would be refused.
    """
    if reader.wrapping is not None:
        check_inside(method, str(reader.origin), reader.wrapping.wrapper.name)
    method.check(reader.shapes, ratio)
    method.check_layers(reader.family, reader.config)
    layers = _known_layers(reader.shapes, method, ratio)
    before = sum(s.parameters for s in reader.shapes)
    if layers is None:
        removed = round(ratio * sum(s.prunable_parameters for s in method.prunable(reader.shapes)))
        removed_bytes = removed * reader.dtype.itemsize
    else:
        kept = zip(reader.shapes, layers, strict=True)
        removed = before - sum(shape.kept(**own).parameters for shape, own in kept)
        removed_bytes = _removed_bytes(reader, layers)
    after = reader.bytes - (removed_bytes if method.shrinks else 0)
    sizes = Sizes(reader.shapes, method, ratio, samples, sequence_length, dtype.itemsize, reader.dtype.itemsize)
    costs = costs_of(sizes)
    working = {name: cost for name, cost in costs.items() if cost.flops()}
    flops = {name: cost.flops() for name, cost in working.items()}
    train = None
    if method.training is not None:
        budget = device_memory or _whole_memory(device, named)
        train = training_cost(reader, method.training, method.name, sequence_length, dtype, budget)
        flops["train"] = train.flops()
    sampling = sampling_cost(reader, sampled, sequence_length, device, dtype, named) if sampled else None
    if sampling is not None:
        flops = {"sampling": sampling.flops()} | flops
    read = reader.bytes * (1 + ("calibration" in flops) + bool(sampled) + (train is not None))
    known: dict[str, Any] = {
        "method": method.name,
        "options": method.options,
        "ratio": ratio,
        "parameters": {"decoder_linears": [before, before - removed]},
        "bytes": [reader.bytes, after],
        "bytes_read": read,
        "reading": {"bytes": read, "seconds": round(read / READ_RATE, 3), "bytes_per_second": READ_RATE},
        "bytes_written": after,
        "layers": layers,
        "zeros": not method.shrinks,
        "device": named or str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "recomputed_activations": None if train is None else train.recompute,
    }
    if named is None and device.type == "cpu":
        rate = matmul_rate(device, dtype) if method.needs_text else 0.0
        embeddings = reader.tensors[reader.family.embeddings].bytes
        run = CpuRun(micro_batch(device, sequence_length), embeddings, dtype != reader.dtype)
        peaks = [cost.cpu_bytes(run) for cost in costs.values()]
        seconds = {name: work / rate for name, work in flops.items()}
        if sampling is not None:
            seconds["sampling"] = sampling.cpu_seconds(rate)
            peaks.append(sampling.device_bytes())
        peak = resident_peak() + max(*peaks, 0 if train is None else train.device_bytes())
        passes = pass_estimates(flops, seconds)
        return Estimate(**known, peak_memory_bytes=peak, host_memory_bytes=peak, passes=passes)
    memory = plan_memory(sizes, device_memory or _whole_memory(device, named))
    rates = GPU_RATES[named] if named else measured_rates(device, dtype)
    seconds = {name: cost.seconds(rates) for name, cost in working.items()}
    by_pass = memory.device_bytes
    if sampling is not None:
        seconds["sampling"] = sampling.seconds(rates)
        by_pass = {"sampling": sampling.device_bytes()} | by_pass
    if train is not None:
        seconds["train"] = train.seconds(rates)
        by_pass = by_pass | {"train": train.device_bytes()}
    return Estimate(
        **known,
        peak_memory_bytes=max(memory.peak, *by_pass.values()),
        peak_memory_by_pass=by_pass,
        host_memory_bytes=resident_peak() + memory.host_bytes + HOST_BUFFERS,
        windows_a_batch=memory.batch,
        hidden_states="device" if not memory.host_bytes else "host, in part" if memory.on_device else "host",
        rates=asdict(rates),
        passes=pass_estimates(flops, seconds),
    )


def pass_estimates(flops: dict[str, float], seconds: dict[str, float]) -> list[PassEstimate]:
    """Entries of the passes that compute anything."""
    return [{"pass": name, "flops": work, "seconds": round(seconds[name], 1)} for name, work in flops.items()]


def sampling_cost(
    reader: CheckpointReader,
    samples: int,
    sequence_length: int,
    device: torch.device,
    dtype: torch.dtype,
    named: str | None,
) -> SamplingCost:
    """Cost of the text that the model writes itself."""
    budget = cache_budget(device, int(MEMORY[named]) if named else None)
    weights = reader.parameters * dtype.itemsize
    return SamplingCost(reader.shapes, weights, samples, sequence_length, dtype.itemsize, budget)


def training_cost(
    reader: CheckpointReader, training: Training, name: str, sequence_length: int, dtype: torch.dtype, budget: int
) -> TrainCost:
    """Cost of training the named method's masks within `budget` bytes. InputError: it does not fit."""
    memory = training_memory(reader, training, sequence_length, dtype)
    return TrainCost(reader.shapes, training, sequence_length, memory, check_fits(memory, budget, name))


def _whole_memory(device: torch.device, named: str | None) -> int:
    return int(FREE_SHARE * MEMORY[named]) if named else usable_memory(device)


def _known_layers(shapes: list[LayerShape], method: Method, ratio: float) -> list[LayerSizes] | None:
    counts = method.known_counts(shapes, ratio)
    if counts is None:
        return None
    return [
        {
            "kv_groups": s.kv_groups - c[ATTENTION],
            "intermediate_channels": s.intermediate_channels - c[FFN],
        }
        for s, c in zip(shapes, counts, strict=True)
    ]


def _removed_bytes(reader: CheckpointReader, layers: list[LayerSizes]) -> int:
    """Bytes of the rows and columns that go, of biases and norms of heads as well; without compensation biases."""
    removed = 0
    for layer, (shape, own) in enumerate(zip(reader.shapes, layers, strict=True)):
        stored, kept = reader.layer_tensors(layer), shape.kept(**own)
        for sublayer in shape.sublayers:
            names = [f"{reader.family.output_proj(sublayer)}.weight"]
            for name in reader.family.unit_rows(shape, sublayer):
                names += [full for full in (f"{name}.weight", f"{name}.bias") if full in stored]
            whole = sum(stored[name].bytes for name in names)
            removed += whole - whole * kept.units(sublayer) // shape.units(sublayer)
    return removed
