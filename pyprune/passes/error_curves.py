"""Calibration pass of residual allocation: error curves of the dense model's output projections; cached."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allocation.residual import ErrorCurves, deepest_cut, error_curve
from ..architectures import FFN, SUBLAYERS, LayerShape
from ..calibration.channel_statistics import column_norms
from ..calibration.second_moments import HessianObserver, SecondMoments
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

    They are taken over the first `allocation_windows` windows, an FFN's up to `deepest_cut` of its channels.
    """
    deepest = deepest_cut(method.ratio_within(job.reader.shapes, job.ratio))
    files = [curves_file(job, method, tenths) for tenths in range(deepest, 11)]
    stored = distributed.broadcast_object(lambda: first_curves(job, files, deepest))
    if stored is not None:
        return stored, True
    path, identity = files[0]
    with LayerLog(job, path, identity, distributed.is_main_process()) as log:
        curves = measure_curves(job, method, deepest, meter, log)
        if distributed.is_main_process() and path is not None:
            tensors = {
                f"{layer}.{sublayer}": curve for layer, own in enumerate(curves) for sublayer, curve in own.items()
            }
            save_cached(tensors, path, job.source(), identity)
    return curves, False


def curves_file(job: Job, method: SecondOrderMethod, tenths: int) -> tuple[Path | None, dict[str, Any]]:
    return job.cache_file(
        "curves",
        ("hessian", "grouped_cholesky_errors", "eliminate"),
        damping=method.damping,
        centred=method.centred,
        samples=method.allocation_windows,
        tenths=tenths,
        format=FORMAT,
    )


def removals(shape: LayerShape, sublayer: str, tenths: int) -> int:
    """Units of the sublayer that its curve covers; KV groups are few, and theirs is whole."""
    units = shape.units(sublayer)
    return min(units - 1, math.ceil(tenths * units / 10)) if sublayer == FFN else units - 1


def cut(curves: ErrorCurves, shape: LayerShape, tenths: int) -> ErrorCurves:
    """Cut curves of a deeper calibration pass to `tenths`; empty if it was not deeper.

    A calibration pass goes on to the last unit where its end is negligible; a deeper one may have ended where it was
    not.
    """
    result = {}
    for sublayer, curve in curves.items():
        length = removals(shape, sublayer, tenths) + 1
        to_the_end = curve if len(curve) == shape.units(sublayer) else curve[:0]
        result[sublayer] = to_the_end if curve[length - 1] < NEGLIGIBLE else curve[:length]
    return result


def first_curves(job: Job, files: list[tuple[Path | None, dict[str, Any]]], tenths: int) -> list[ErrorCurves] | None:
    """Load curves of `tenths` from their own file, or from that of a deeper calibration pass.

    files: with the identity that each has to be of.
    """
    for path, identity in files:
        layers = load_curves(job, path, identity) if path is not None and path.is_file() else None
        if layers is not None:
            found = [cut(own, shape, tenths) for own, shape in zip(layers, job.reader.shapes, strict=True)]
            if all(len(curve) for own in found for curve in own.values()):
                return found
    return None


def load_curves(job: Job, path: Path, identity: dict[str, Any]) -> list[ErrorCurves] | None:
    """Load the file of `cached_curves`; None if it is of other weights. InputError if the file is damaged."""
    tensors, metadata = load_cached(path, "error curves", identity)
    if not job.accepts(path, metadata):
        return None
    try:
        curves = [
            {sublayer: tensors[f"{layer}.{sublayer}"] for sublayer in shape.sublayers}
            for layer, shape in enumerate(job.reader.shapes)
        ]
    except KeyError as error:
        raise InputError(f"{path}: damaged error curves ({error}); delete it") from error
    for own, shape in zip(curves, job.reader.shapes, strict=True):
        for sublayer, curve in own.items():
            if curve.dim() != 1 or not 1 <= len(curve) <= shape.units(sublayer):
                raise InputError(f"{path}: damaged error curves (of shape {list(curve.shape)}); delete it")
    return curves


@torch.no_grad()
def measure_curves(job: Job, method: SecondOrderMethod, deepest: int, meter: Meter, log: LayerLog) -> list[ErrorCurves]:
    """One forward of the dense model, layer by layer; each output projection is eliminated as far as the curves go.

    Layers that the log holds are only passed.
    """
    reader, forward = job.reader, job.forward(method.allocation_windows)
    hidden = forward.embed()
    curves = []
    for layer, source in stored_layers(job, "calibration", meter):
        shape = reader.shapes[layer]
        block = build_dense(job, forward, source, layer)
        known = distributed.broadcast_object(partial(log.read, layer))
        own: ErrorCurves = {} if known is None else known[0]
        for sublayer in SUBLAYERS:
            where = layer_name(reader.family, layer, sublayer)
            if known is not None or sublayer not in shape.sublayers:
                for part in hidden.micro_batches():
                    forward.step(block, layer, sublayer, part)
                continue
            with meter.stage("forward and hessian"):
                second_moments, energy = observe_sublayer(forward, block, layer, sublayer, hidden, method.centred)
            with meter.stage("choice"):
                weight = block.get_parameter(reader.family.output_proj(sublayer) + ".weight").data
                gain = forward.gain(block, sublayer)
                weight = weight if gain is None else weight * gain[:, None]
                own[sublayer] = curve_of(
                    second_moments, energy, weight, shape, sublayer, deepest, method.damping, where
                )
            del second_moments, weight
        if known is None:
            log.write(layer, own, {})
        curves.append(own)
        del block  # freed before the next one is built
    return curves


def observe_sublayer(
    forward: LayerForward, block: torch.nn.Module, layer: int, sublayer: str, hidden: HiddenStates, centred: bool
) -> tuple[SecondMoments, float]:
    """Second moments of one output projection's inputs, and the residual stream's energy; advances `hidden`."""
    channels = block.get_parameter(forward.family.output_proj(sublayer) + ".weight").shape[1]
    where = layer_name(forward.family, layer, sublayer)
    observer = HessianObserver(channels, forward.device, where, centred, forward.allow_nonfinite)
    energy = torch.zeros((), dtype=torch.float64, device=forward.device)
    with forward.observed(block, {forward.family.output_proj(sublayer): observer.observe}):
        for part in hidden.micro_batches():
            result = forward.step(block, layer, sublayer, part)
            energy += torch.linalg.vector_norm(result, dtype=torch.float32).double() ** 2
    second_moments = observer.result()
    distributed.all_reduce_(energy)
    return second_moments, float(energy) / second_moments.count


def curve_of(
    second_moments: SecondMoments,
    energy: float,
    weight: Tensor,
    shape: LayerShape,
    sublayer: str,
    tenths: int,
    damping: float,
    where: str,
) -> Tensor:
    """The sublayer's error curve, [removals + 1]; the second moments are used up."""
    column_norms(weight, where)  # names NaN and Inf
    count, last = removals(shape, sublayer, tenths), shape.units(sublayer) - 1
    curve = error_curve(torch.empty(0), second_moments.count, energy)
    for n in (count, last):
        # One unit's curve is a point, and a whole curve needs no second look.
        if len(curve) <= n and float(curve[-1]) < NEGLIGIBLE:
            hessian = second_moments.take_hessian() if n == last else second_moments.hessian
            damped = damped_inverse(hessian, damping, where)
            del hessian
            gram, width = lower_gram(weight.masked_fill(damped.dead, 0)), shape.unit_width(sublayer)
            errors = eliminate(damped.inverse, gram, n, width, keep_factor=False, tf32=True).errors
            curve = error_curve(errors, second_moments.count, energy)
            del damped, gram, errors  # before the second round makes its own
    return curve
