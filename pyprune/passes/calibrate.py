"""The first pass: a forward of the dense model, layer by layer, and the statistics of every driver; cached."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..architectures import MODULES, LayerShape
from ..calibration.channel_statistics import DriverObserver, DriverStatistics, column_norms
from ..checkpoint import CheckpointReader, load_cached, metadata_of, save_cached
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

FORMAT = "pyprune-survey-2"  # part of a survey's name: a change of the formulas makes old ones unfindable


def observe_layer(
    forward: LayerForward,
    block: torch.nn.Module,
    layer: int,
    hidden: HiddenStates,
    by_window: bool,
    advance: bool,
) -> LayerStatistics:
    """Statistics of both drivers of a layer from one forward over `hidden` (overwritten with `advance`)."""
    observers = {
        module: DriverObserver(
            block.get_parameter(forward.family.driver(module) + ".weight").data,
            layer_name(forward.family, layer, module),
            by_window,
            forward.allow_nonfinite,
        )
        for module in MODULES
    }
    forward.run(
        block, layer, hidden, {forward.family.driver(m): o.observe for m, o in observers.items()}, advance=advance
    )
    return {module: observer.finish() for module, observer in observers.items()}


def survey_model(job: Job, by_window: bool, meter: Meter, log: LayerLog) -> list[LayerStatistics]:
    """Statistics of every layer on the dense model's own activations; one layer in memory at a time.

    Layers that the log holds are only passed.
    """
    forward, last = job.forward(), job.reader.layers - 1
    hidden = forward.embed()
    survey = []
    for layer, source in stored_layers(job, "survey", meter):
        with meter.stage("forward"):
            block = build_dense(job, forward, source, layer)
            known = distributed.from_first(partial(log.read, layer))
            if known is None:
                statistics = observe_layer(forward, block, layer, hidden, by_window, advance=layer < last)
                log.write(layer, *packed(statistics))
            else:
                statistics = unpacked(*known)
                if layer < last:
                    forward.run(block, layer, hidden, {})
            survey.append(statistics)
            del block  # freed before the next one is built
    return survey


def survey_weights(
    reader: CheckpointReader, device: torch.device, meter: Meter, progress: Progress
) -> list[LayerStatistics]:
    """The survey of a method that needs no text: norms of the drivers' columns."""
    survey = []
    for layer in range(reader.layers):
        progress("survey", layer, reader.layers)
        with meter.layer():
            names = {m: f"{reader.layer_prefix(layer)}{reader.family.driver(m)}.weight" for m in MODULES}
            weights = reader.read(list(names.values()))
            survey.append(
                {
                    m: DriverStatistics(*column_norms(weights[name].to(device), layer_name(reader.family, layer, m)))
                    for m, name in names.items()
                }
            )
    progress("survey", reader.layers, reader.layers)
    return survey


def cached_survey(job: Job, by_window: bool, meter: Meter) -> tuple[list[LayerStatistics], bool]:
    """The survey of the job's model and text, and whether it was there already; a new one is kept."""
    path, identity = job.cache_file("survey", ("channel_moments",), by_window=by_window, format=FORMAT)
    stored = distributed.from_first(lambda: load_survey(job, path, identity) if path.is_file() else None)
    if stored is not None:
        return stored, True
    with LayerLog(job, path, identity, distributed.is_first()) as log:
        survey = survey_model(job, by_window, meter, log)
        if distributed.is_first():
            save_survey(path, survey, identity, job.source())
    return survey, False


def packed(statistics: LayerStatistics) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that holds a layer's statistics (a few numbers a channel)."""
    tensors = {f"{module}.{name}": t for module, own in statistics.items() for name, t in own.tensors().items()}
    counts = {module: [own.count, own.windows, own.nonfinite] for module, own in statistics.items()}
    return tensors, {"counts": json.dumps(counts)}


def unpacked(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> LayerStatistics:
    """What `packed` took apart."""
    statistics: LayerStatistics = {}
    for module, (count, windows, nonfinite) in json.loads(metadata["counts"]).items():
        own = {name: tensors[f"{module}.{name}"] for name in DriverStatistics.TENSORS if f"{module}.{name}" in tensors}
        statistics[module] = DriverStatistics(count=count, windows=windows, nonfinite=nonfinite, **own)
    return statistics


def load_survey(job: Job, path: Path, identity: dict[str, Any]) -> list[LayerStatistics] | None:
    """What `save_survey` wrote; None if it was of other weights. InputError if the file is damaged."""
    stored, metadata = load_cached(path, "survey", identity)
    return survey_of(path, stored, metadata, job.reader.shapes) if job.accepts(path, metadata) else None


def survey_of(
    path: Path, stored: dict[str, torch.Tensor], metadata: dict[str, str], shapes: list[LayerShape]
) -> list[LayerStatistics]:
    """The survey from what a file holds. InputError: it is not one of layers of these shapes."""
    counts, survey = metadata_of(metadata, "counts", path), []
    try:
        for layer, shape in enumerate(shapes):
            own = {name.removeprefix(f"{layer}."): t for name, t in stored.items() if name.startswith(f"{layer}.")}
            survey.append(unpacked(own, {"counts": json.dumps(counts[layer])}))
            for module in MODULES:
                channels = shape.units(module) * shape.unit_width(module)
                if any(t.shape != (channels,) for t in survey[-1][module].tensors().values()):
                    raise ValueError(f"layer {layer}: not {channels} channels of {module}")
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: a damaged survey ({error}); delete it") from error
    return survey


def save_survey(path: Path, survey: list[LayerStatistics], identity: dict[str, Any], source: dict[str, str]) -> None:
    """Write the statistics so that another ratio needs no new forward."""
    tensors: dict[str, torch.Tensor] = {}
    counts = []
    for layer, statistics in enumerate(survey):
        own, metadata = packed(statistics)
        tensors |= {f"{layer}.{name}": t for name, t in own.items()}
        counts.append(json.loads(metadata["counts"]))
    save_cached(tensors, path, {"counts": json.dumps(counts)} | source, identity)
