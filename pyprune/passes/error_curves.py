"""The survey of residual allocation: error curves of both drivers of every layer on the dense model; cached."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allocation.residual import ErrorCurves, deepest_cut, error_curve
from ..architectures import FFN, MODULES, LayerShape
from ..calibration.channel_statistics import column_norms
from ..calibration.second_moments import Curvature, CurvatureObserver
from ..checkpoint import load_cached, save_cached
from ..errors import InputError
from ..forward.hidden_states import HiddenStates
from ..forward.layer_forward import LayerForward, layer_name
from ..job.job import Job
from ..methods import SecondOrderMethod
from ..ops import damped_inverse, eliminate, lower_gram
from ..runtime import distributed
from ..runtime.device import Meter
from .base import build_dense, stored_layers
from .layer_cache import LayerLog

FORMAT = "pyprune-curves-2"  # part of a file's name: a change of the formulas makes old ones unfindable

# A curve goes on beyond `deepest_cut` where less than a ten-thousandth of the stream's energy is lost by then: the
# layer is dead or nearly so.
NEGLIGIBLE = 1e-4


def cached_curves(job: Job, method: SecondOrderMethod, meter: Meter) -> tuple[list[ErrorCurves], bool]:
    """The curves of the job's model and text, and whether they were there already; new ones are kept.

    They are taken over the first `survey_windows` windows, an FFN's up to `deepest_cut` of its channels.
    """
    deepest = deepest_cut(job.ratio)
    files = [curves_file(job, method, tenths) for tenths in range(deepest, 11)]
    stored = distributed.from_first(lambda: first_curves(job, files, deepest))
    if stored is not None:
        return stored, True
    path, identity = files[0]
    with LayerLog(job, path, identity, distributed.is_first()) as log:
        curves = survey_curves(job, method, deepest, meter, log)
        if distributed.is_first():
            tensors = {f"{layer}.{module}": curve for layer, own in enumerate(curves) for module, curve in own.items()}
            save_cached(tensors, path, job.source(), identity)
    return curves, False


def curves_file(job: Job, method: SecondOrderMethod, tenths: int) -> tuple[Path, dict[str, Any]]:
    return job.cache_file(
        "curves",
        ("hessian", "grouped_cholesky_errors", "eliminate"),
        damping=method.damping,
        centred=method.centred,
        samples=method.survey_windows,
        tenths=tenths,
        format=FORMAT,
    )


def removals(shape: LayerShape, module: str, tenths: int) -> int:
    """Units of the module that its curve covers; KV groups are few, and theirs is whole."""
    units = shape.units(module)
    return min(units - 1, math.ceil(tenths * units / 10)) if module == FFN else units - 1


def cut(curves: ErrorCurves, shape: LayerShape, tenths: int) -> ErrorCurves:
    """The curves as a survey of so many tenths has them, from one that went deeper; empty: it did not go so deep.

    A survey goes on to the last unit where its end is negligible; a deeper one may have ended where it was not.
    """
    result = {}
    for module, curve in curves.items():
        length = removals(shape, module, tenths) + 1
        to_the_end = curve if len(curve) == shape.units(module) else curve[:0]
        result[module] = to_the_end if curve[length - 1] < NEGLIGIBLE else curve[:length]
    return result


def first_curves(job: Job, files: list[tuple[Path, dict[str, Any]]], tenths: int) -> list[ErrorCurves] | None:
    """As a survey of so many tenths has them: from its own file, or one after it, of a survey that went deeper.

    files: with the identity that each has to be of.
    """
    for path, identity in files:
        layers = load_curves(job, path, identity) if path.is_file() else None
        if layers is not None:
            found = [cut(own, shape, tenths) for own, shape in zip(layers, job.reader.shapes, strict=True)]
            if all(len(curve) for own in found for curve in own.values()):
                return found
    return None


def load_curves(job: Job, path: Path, identity: dict[str, Any]) -> list[ErrorCurves] | None:
    """What `cached_curves` kept; None if it was of other weights. InputError if the file is damaged."""
    tensors, metadata = load_cached(path, "error curves", identity)
    if not job.accepts(path, metadata):
        return None
    try:
        curves = [{module: tensors[f"{layer}.{module}"] for module in MODULES} for layer in range(job.reader.layers)]
    except KeyError as error:
        raise InputError(f"{path}: damaged error curves ({error}); delete it") from error
    for own, shape in zip(curves, job.reader.shapes, strict=True):
        for module, curve in own.items():
            if curve.dim() != 1 or not 1 <= len(curve) <= shape.units(module):
                raise InputError(f"{path}: damaged error curves (of shape {list(curve.shape)}); delete it")
    return curves


@torch.no_grad()
def survey_curves(job: Job, method: SecondOrderMethod, deepest: int, meter: Meter, log: LayerLog) -> list[ErrorCurves]:
    """One forward of the dense model, layer by layer; each driver is eliminated as far as the curves go.

    Layers that the log holds are only passed.
    """
    reader, forward = job.reader, job.forward(method.survey_windows)
    hidden = forward.embed()
    curves = []
    for layer, source in stored_layers(job, "survey", meter):
        shape = reader.shapes[layer]
        block = build_dense(job, forward, source, layer)
        known = distributed.from_first(partial(log.read, layer))
        own: ErrorCurves = {} if known is None else known[0]
        for module in MODULES:
            where = layer_name(reader.family, layer, module)
            if known is not None:
                for part in hidden.parts():
                    part.replace(forward.half(block, layer, module, part.value))
                continue
            with meter.stage("forward and hessian"):
                curvature, energy = observe_half(forward, block, layer, module, hidden, method.centred)
            with meter.stage("choice"):
                weight = block.get_parameter(reader.family.driver(module) + ".weight").data
                own[module] = curve_of(curvature, energy, weight, shape, module, deepest, method.damping, where)
            del curvature, weight
        if known is None:
            log.write(layer, own, {})
        curves.append(own)
        del block  # freed before the next one is built
    return curves


def observe_half(
    forward: LayerForward, block: torch.nn.Module, layer: int, module: str, hidden: HiddenStates, centred: bool
) -> tuple[Curvature, float]:
    """Curvature of one driver and the energy of the residual stream after it; `hidden` advances past the module."""
    channels = block.get_parameter(forward.family.driver(module) + ".weight").shape[1]
    where = layer_name(forward.family, layer, module)
    observer = CurvatureObserver(channels, forward.device, where, centred, forward.allow_nonfinite)
    energy = torch.zeros((), dtype=torch.float64, device=forward.device)
    with forward.observed(block, {forward.family.driver(module): observer.observe}):
        for part in hidden.parts():
            result = forward.half(block, layer, module, part.value)
            energy += torch.linalg.vector_norm(result, dtype=torch.float32).double() ** 2
            part.replace(result)
    curvature = observer.finish()
    distributed.all_reduce_(energy)
    return curvature, float(energy) / curvature.count


def curve_of(
    curvature: Curvature,
    energy: float,
    weight: Tensor,
    shape: LayerShape,
    module: str,
    tenths: int,
    damping: float,
    where: str,
) -> Tensor:
    """The module's error curve, [removals + 1]; the curvature is used up."""
    column_norms(weight, where)  # names NaN and Inf
    count, last = removals(shape, module, tenths), shape.units(module) - 1
    curve = error_curve(torch.empty(0), curvature.count, energy)
    for n in (count, last):
        # One unit's curve is a point, and a whole curve needs no second look.
        if len(curve) <= n and float(curve[-1]) < NEGLIGIBLE:
            hessian = curvature.take_hessian() if n == last else curvature.hessian
            damped = damped_inverse(hessian, damping, where)
            del hessian
            gram, width = lower_gram(weight.masked_fill(damped.dead, 0)), shape.unit_width(module)
            errors = eliminate(damped.inverse, gram, n, width, keep_factor=False, tf32=True).errors
            curve = error_curve(errors, curvature.count, energy)
            del damped, gram, errors  # before the second round makes its own
    return curve
