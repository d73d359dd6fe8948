"""Calibration pass: forward the dense model layer by layer and collect statistics of each output projection."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..architectures import LayerShape
from ..calibration.channel_statistics import ChannelObserver, ChannelStatistics, column_norms
from ..checkpoint import ModelSource, load_cached, metadata_of, save_cached
from ..errors import InputError
from ..forward.hidden_states import HiddenStates
from ..forward.layer_forward import LayerForward, layer_name
from ..job.job import Job
from ..methods import LayerStatistics
from ..runtime import distributed
from ..runtime.device import Meter
from ..runtime.progress import Progress
from .base import build_dense, stored_layers
from .layer_cache import LayerLog

FORMAT = "pyprune-calibration-2"  # part of a cache file's name: a change of the formulas makes old files unfindable


def observe_layer(
    forward: LayerForward,
    block: torch.nn.Module,
    layer: int,
    hidden: HiddenStates,
    by_window: bool,
    advance: bool,
) -> LayerStatistics:
    """Statistics of both output projections of a layer from one forward over `hidden` (overwritten with `advance`)."""
    observers = {
        sublayer: ChannelObserver(
            block.get_parameter(forward.family.output_proj(sublayer) + ".weight").data,
            layer_name(forward.family, layer, sublayer),
            by_window,
            forward.allow_nonfinite,
            forward.gain(block, sublayer),
        )
        for sublayer in forward.reader.shapes[layer].sublayers
    }
    forward.run(
        block, layer, hidden, {forward.family.output_proj(m): o.observe for m, o in observers.items()}, advance=advance
    )
    return {sublayer: observer.result() for sublayer, observer in observers.items()}


def calibrate_model(job: Job, by_window: bool, meter: Meter, log: LayerLog) -> list[LayerStatistics]:
    """Collect every layer's statistics on the dense model's activations; one layer in memory at a time.

    Layers that the log holds are only passed.
    """
    forward, last = job.forward(), job.reader.layers - 1
    hidden = forward.embed()
    statistics_by_layer = []
    for layer, source in stored_layers(job, "calibration", meter):
        with meter.stage("forward"):
            block = build_dense(job, forward, source, layer)
            known = distributed.broadcast_object(partial(log.read, layer))
            if known is None:
                statistics = observe_layer(forward, block, layer, hidden, by_window, advance=layer < last)
                log.write(layer, *packed(statistics))
            else:
                statistics = unpacked(*known)
                if layer < last:
                    forward.run(block, layer, hidden, {})
            statistics_by_layer.append(statistics)
            del block  # freed before the next one is built
    return statistics_by_layer


def weight_statistics(
    reader: ModelSource, device: torch.device, meter: Meter, progress: Progress
) -> list[LayerStatistics]:
    """The calibration pass of a method that needs no text: norms of the output projections' columns."""
    statistics_by_layer = []
    for layer in range(reader.layers):
        progress("calibration", layer, reader.layers)
        with meter.layer():
            prefix, sublayers = reader.layer_prefix(layer), reader.shapes[layer].sublayers
            names = {m: f"{prefix}{reader.family.output_proj(m)}.weight" for m in sublayers}
            weights = reader.read(list(names.values()))
            statistics_by_layer.append(
                {
                    m: ChannelStatistics(*column_norms(weights[name].to(device), layer_name(reader.family, layer, m)))
                    for m, name in names.items()
                }
            )
    progress("calibration", reader.layers, reader.layers)
    return statistics_by_layer


def cached_statistics(job: Job, by_window: bool, meter: Meter) -> tuple[list[LayerStatistics], bool]:
    """The calibration pass of the job's model and text, and whether it was there already; a new one is cached."""
    path, identity = job.cache_file("calibration", ("channel_moments",), by_window=by_window, format=FORMAT)
    stored = distributed.broadcast_object(lambda: load_statistics(job, path, identity))
    if stored is not None:
        return stored, True
    with LayerLog(job, path, identity, distributed.is_main_process()) as log:
        statistics_by_layer = calibrate_model(job, by_window, meter, log)
        if distributed.is_main_process() and path is not None:
            save_statistics(path, statistics_by_layer, identity, job.source())
    return statistics_by_layer, False


def packed(statistics: LayerStatistics) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that holds a layer's statistics (a few numbers a channel)."""
    tensors = {f"{sublayer}.{name}": t for sublayer, own in statistics.items() for name, t in own.tensors().items()}
    counts = {sublayer: [own.count, own.windows, own.nonfinite] for sublayer, own in statistics.items()}
    return tensors, {"counts": json.dumps(counts)}


def unpacked(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> LayerStatistics:
    """Restore the statistics from what `packed` returned."""
    statistics: LayerStatistics = {}
    for sublayer, (count, windows, nonfinite) in json.loads(metadata["counts"]).items():
        own = {
            name: tensors[f"{sublayer}.{name}"] for name in ChannelStatistics.TENSORS if f"{sublayer}.{name}" in tensors
        }
        statistics[sublayer] = ChannelStatistics(count=count, windows=windows, nonfinite=nonfinite, **own)
    return statistics


def load_statistics(job: Job, path: Path | None, identity: dict[str, Any]) -> list[LayerStatistics] | None:
    """Load what `save_statistics` wrote; None if it is not there, or of other weights. InputError: a damaged file."""
    if path is None or not path.is_file():
        return None
    stored, metadata = load_cached(path, "calibration pass", identity)
    return statistics_of(path, stored, metadata, job.reader.shapes) if job.accepts(path, metadata) else None


def statistics_of(
    path: Path, stored: dict[str, torch.Tensor], metadata: dict[str, str], shapes: list[LayerShape]
) -> list[LayerStatistics]:
    """Restore the calibration pass from a file. InputError: it is not one of layers of these shapes."""
    counts, statistics_by_layer = metadata_of(metadata, "counts", path), []
    try:
        for layer, shape in enumerate(shapes):
            own = {name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.startswith(f"{layer}.")}
            statistics_by_layer.append(unpacked(own, {"counts": json.dumps(counts[layer])}))
            for sublayer in shape.sublayers:
                channels = shape.units(sublayer) * shape.unit_width(sublayer)
                if any(t.shape != (channels,) for t in statistics_by_layer[-1][sublayer].tensors().values()):
                    raise ValueError(f"layer {layer}: not {channels} channels of {sublayer}")
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: a damaged calibration pass ({error}); delete it") from error
    return statistics_by_layer


def save_statistics(
    path: Path, statistics_by_layer: list[LayerStatistics], identity: dict[str, Any], source: dict[str, str]
) -> None:
    """Write the statistics so that another ratio needs no new forward."""
    tensors: dict[str, torch.Tensor] = {}
    counts = []
    for layer, statistics in enumerate(statistics_by_layer):
        own, metadata = packed(statistics)
        tensors |= {f"{layer}.{name}": t for name, t in own.items()}
        counts.append(json.loads(metadata["counts"]))
    save_cached(tensors, path, {"counts": json.dumps(counts)} | source, identity)
