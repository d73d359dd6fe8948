"""Passes over a model's layers: calibrate and prune."""

from collections.abc import Callable
from typing import Any

from ..checkpoint import CheckpointWriter
from ..job.job import Job
from .base import Passes
from .reconstruct import ReconstructionPasses
from .slice import ScoringPasses
from .sparsify import SparsifyingPasses
from .train_masks import PolicyPasses, SelectionPasses

# `Method.procedure` -> the passes; `estimation.procedures.PROCEDURES` has their costs by the same names.
PASSES: dict[str, Callable[[Job, CheckpointWriter, Any], Passes]] = {
    "slice": ScoringPasses,
    "reconstruct": ReconstructionPasses,
    "sparsify": SparsifyingPasses,
    "train-selections": SelectionPasses,
    "train-units": PolicyPasses,
}


def make_passes(job: Job, writer: CheckpointWriter) -> Passes:
    """The passes that the job's method needs."""
    return PASSES[job.method.procedure](job, writer, job.method)


__all__ = ["PASSES", "Passes", "make_passes"]
