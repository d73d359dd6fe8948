"""Passes over a model's layers: calibrate and prune."""

from ..checkpoint import CheckpointWriter
from ..job.job import Job
from ..methods import Disp, Policy, ScoringMethod, SecondOrderMethod, SemiStructuredMethod
from .base import Passes
from .reconstruct import ReconstructionPasses
from .slice import ScoringPasses
from .sparsify import SparsifyingPasses
from .train_masks import PolicyPasses, SelectionPasses


def make_passes(job: Job, writer: CheckpointWriter) -> Passes:
    """The passes that the job's method needs."""
    if isinstance(job.method, SecondOrderMethod):
        return ReconstructionPasses(job, writer, job.method)
    if isinstance(job.method, Disp):
        return SelectionPasses(job, writer, job.method)
    if isinstance(job.method, Policy):
        return PolicyPasses(job, writer, job.method)
    if isinstance(job.method, SemiStructuredMethod):
        return SparsifyingPasses(job, writer, job.method)
    assert isinstance(job.method, ScoringMethod)
    return ScoringPasses(job, writer, job.method)


__all__ = ["Passes", "make_passes"]
