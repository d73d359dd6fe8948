"""The survey of residual allocation: error curves of both drivers of every layer on the dense model; cached."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..architectures import MODULES
from ..checkpoint import save_cached
from ..curvature import Curvature, CurvatureObserver
from ..device import Meter
from ..errors import InputError
from ..forward import LayerForward, layer_name
from ..job import Job
from ..methods import SecondOrderMethod
from ..ops import damped_inverse, eliminate
from ..residual_allocation import ErrorCurves, error_curve
from ..statistics import column_norms

FORMAT = "pyprune-curves-1"  # part of a file's name: a change of the formulas makes old ones unfindable


def cached_curves(job: Job, method: SecondOrderMethod, meter: Meter) -> tuple[list[ErrorCurves], bool]:
    """The curves of the job's model and text, and whether they were there already; new ones are kept."""
    path, identity = job.cache_file(
        "curves",
        ("hessian", "grouped_cholesky_errors", "eliminate"),
        damping=method.damping,
        centred=method.centred,
        format=FORMAT,
    )
    if path.is_file():
        return load_curves(path, job.reader.layers), True
    curves = survey_curves(job, method, meter)
    tensors = {f"{layer}.{module}": curve for layer, own in enumerate(curves) for module, curve in own.items()}
    save_cached(tensors, path, {"identity": json.dumps(identity)})
    return curves, False


def load_curves(path: Path, layers: int) -> list[ErrorCurves]:
    """What `cached_curves` kept; InputError if the file is damaged."""
    try:
        tensors = load_file(path)
        return [{module: tensors[f"{layer}.{module}"] for module in MODULES} for layer in range(layers)]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: damaged error curves ({error}); delete it") from error


@torch.no_grad()
def survey_curves(job: Job, method: SecondOrderMethod, meter: Meter) -> list[ErrorCurves]:
    """One forward of the dense model, layer by layer; each driver is eliminated to the last unit."""
    reader, forward = job.reader, job.forward()
    hidden = forward.embed()
    curves = []
    for layer, shape in enumerate(reader.shapes):
        job.progress("survey", layer, reader.layers)
        with meter.layer():
            block = forward.build(reader.stream_layer(layer), layer)
            own = {}
            for module in MODULES:
                where = layer_name(reader.family, layer, module)
                weight = block.get_parameter(reader.family.driver(module) + ".weight").data
                curvature, energy = observe_half(forward, block, layer, module, hidden, method.centred)
                errors = removal_errors(curvature, weight, shape.unit_width(module), method.damping, where)
                own[module] = error_curve(errors, curvature.count, energy)
            curves.append(own)
    job.progress("survey", reader.layers, reader.layers)
    return curves


def observe_half(
    forward: LayerForward, block: torch.nn.Module, layer: int, module: str, hidden: Tensor, centred: bool
) -> tuple[Curvature, float]:
    """Curvature of one driver and the energy of the residual stream after it; `hidden` advances past the module."""
    channels = block.get_parameter(forward.family.driver(module) + ".weight").shape[1]
    where = layer_name(forward.family, layer, module)
    observer = CurvatureObserver(channels, forward.device, where, centred, forward.allow_nonfinite)
    energy = torch.zeros((), dtype=torch.float64, device=forward.device)
    with forward.observed(block, {module: observer.observe}):
        for part in forward.parts(hidden):
            result = forward.half(block, layer, module, forward.to_device(part))
            energy += torch.linalg.vector_norm(result, dtype=torch.float32).double() ** 2
            part.copy_(result)
    curvature = observer.finish()
    return curvature, float(energy) / curvature.count


def removal_errors(curvature: Curvature, weight: Tensor, width: int, damping: float, where: str) -> Tensor:
    """Errors at removal of all units but the last, in the order of exact greedy elimination, [units - 1]."""
    column_norms(weight, where)  # names NaN and Inf
    units = weight.shape[1] // width
    if units == 1:
        return torch.empty(0, dtype=torch.float32)
    damped = damped_inverse(curvature.hessian, damping, where)
    own = weight.float().masked_fill(damped.dead, 0)
    return eliminate(damped.inverse, own.T @ own, units - 1, width, keep_factor=False).errors
