"""The first pass: a forward of the dense model, layer by layer, and the statistics of every driver; cached."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..architectures import MODULES
from ..checkpoint import CheckpointReader, save_cached
from ..device import Meter
from ..errors import InputError
from ..forward import LayerForward, layer_name
from ..job import Job
from ..methods import LayerStatistics
from ..options import Progress
from ..statistics import DriverObserver, DriverStatistics, column_norms

FORMAT = "pyprune-survey-1"  # part of a survey's name: a change of the formulas makes old ones unfindable


def observe_layer(
    forward: LayerForward,
    block: torch.nn.Module,
    layer: int,
    hidden: torch.Tensor,
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
    forward.run(block, layer, hidden, {m: o.observe for m, o in observers.items()}, advance=advance)
    return {module: observer.finish() for module, observer in observers.items()}


def survey_model(forward: LayerForward, by_window: bool, meter: Meter, progress: Progress) -> list[LayerStatistics]:
    """Statistics of every layer on the dense model's own activations; one layer in memory at a time."""
    reader, hidden = forward.reader, forward.embed()
    survey = []
    for layer in range(reader.layers):
        progress("survey", layer, reader.layers)
        with meter.layer():
            # Nothing here keeps the layer: it is freed before the next is built.
            survey.append(
                observe_layer(
                    forward,
                    forward.build(reader.stream_layer(layer), layer),
                    layer,
                    hidden,
                    by_window,
                    advance=layer < reader.layers - 1,
                )
            )
    progress("survey", reader.layers, reader.layers)
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
    if path.is_file():
        return load_survey(path, job.reader.layers), True
    survey = survey_model(job.forward(), by_window, meter, job.progress)
    save_survey(path, survey, identity)
    return survey, False


def load_survey(path: Path, layers: int) -> list[LayerStatistics]:
    """What `save_survey` wrote; InputError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            counts = json.loads(f.metadata()["counts"])
            stored = set(f.keys())
            survey: list[LayerStatistics] = [{} for _ in range(layers)]
            for layer in range(layers):
                for module in MODULES:
                    prefix = f"{layer}.{module}."
                    names = [name for name in DriverStatistics.TENSORS if prefix + name in stored]
                    tensors = {name: f.get_tensor(prefix + name) for name in names}
                    count, windows, nonfinite = counts[f"{layer}.{module}"]
                    survey[layer][module] = DriverStatistics(
                        count=count, windows=windows, nonfinite=nonfinite, **tensors
                    )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: a damaged survey ({error}); delete it") from error
    return survey


def save_survey(path: Path, survey: list[LayerStatistics], identity: dict[str, Any]) -> None:
    """Write the statistics (a few numbers a channel) so that another ratio needs no new forward."""
    tensors: dict[str, torch.Tensor] = {}
    counts: dict[str, list[int]] = {}
    for layer, modules in enumerate(survey):
        for module, statistics in modules.items():
            counts[f"{layer}.{module}"] = [statistics.count, statistics.windows, statistics.nonfinite]
            tensors |= {f"{layer}.{module}.{name}": t for name, t in statistics.tensors().items()}
    save_cached(tensors, path, {"identity": json.dumps(identity), "counts": json.dumps(counts)})
