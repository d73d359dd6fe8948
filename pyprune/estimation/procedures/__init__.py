"""Cost of each kind of pass: FLOPs, seconds on a GPU, bytes of the device; and the passes of a method."""

from collections.abc import Callable
from typing import Any

from ...methods import Method, ScoringMethod, SecondOrderMethod, SemiStructuredMethod
from ...methods.second_order import CURVES, NONE
from ..sizes import Sizes
from .base import CpuRun, PassCost
from .calibrate import CalibrationCost, CurvesCost, UncountedCalibrationCost
from .reconstruct import ReconstructCost
from .slice import SequentialSliceCost, SliceCost
from .sparsify import SparsifyCost
from .train import TrainCost

Costs = dict[str, PassCost]  # by the pass's name, in the order in which they run


def slice_costs(sizes: Sizes[ScoringMethod]) -> Costs:
    if sizes.method.sequential:
        return {"prune": SequentialSliceCost(sizes)}
    if not sizes.method.needs_text:
        return {"prune": SliceCost(sizes)}
    return {"calibration": CalibrationCost(sizes), "prune": SliceCost(sizes)}


def reconstruct_costs(sizes: Sizes[SecondOrderMethod]) -> Costs:
    statistics = sizes.method.dense_statistics
    if statistics == NONE:
        return {"prune": ReconstructCost(sizes)}
    calibration = CurvesCost(sizes) if statistics == CURVES else CalibrationCost(sizes, moments_count=False)
    return {"calibration": calibration, "prune": ReconstructCost(sizes)}


def sparsify_costs(sizes: Sizes[SemiStructuredMethod]) -> Costs:
    return {"prune": SparsifyCost(sizes)}


def selection_costs(sizes: Sizes[Method]) -> Costs:
    """Costs of the passes of selections; the training's is a `TrainCost`."""
    return {"calibration": UncountedCalibrationCost(sizes), "prune": SliceCost(sizes)}


def unit_training_costs(sizes: Sizes[Method]) -> Costs:
    """Costs of the passes of trained units; the training's is a `TrainCost`."""
    return {"calibration": CalibrationCost(sizes), "prune": SliceCost(sizes)}


# `Method.procedure` -> the costs of its passes; `passes.PASSES` has the passes by the same names.
PROCEDURES: dict[str, Callable[[Sizes[Any]], Costs]] = {
    "slice": slice_costs,
    "reconstruct": reconstruct_costs,
    "sparsify": sparsify_costs,
    "train-selections": selection_costs,
    "train-units": unit_training_costs,
}


def costs_of(sizes: Sizes) -> Costs:
    """Cost of each pass of the method."""
    return PROCEDURES[sizes.method.procedure](sizes)


__all__ = [
    "PROCEDURES",
    "CalibrationCost",
    "Costs",
    "CpuRun",
    "CurvesCost",
    "PassCost",
    "ReconstructCost",
    "SequentialSliceCost",
    "SliceCost",
    "SparsifyCost",
    "TrainCost",
    "costs_of",
    "slice_costs",
]
