"""Cost of training masks on the whole frozen model."""

from dataclasses import dataclass

from ...architectures import LayerShape
from ...mask_training.policy_learner import MASKS
from ...methods.base import Training
from ..time import TRAINING_SHARE, Rates
from ..training_memory import TrainingMemory
from .base import forward_flops


@dataclass(frozen=True)
class TrainCost:
    """Training masks on the whole frozen model.

    recompute: whether layers are computed again going backward.
    """

    shapes: list[LayerShape]
    training: Training
    sequence_length: int
    memory: TrainingMemory
    recompute: bool

    def flops(self) -> float:
        """Forwards of the drawn masks, or a forward, the way back to the gates, and a forward again; of all steps."""
        rows, length = self.training.rows, self.sequence_length
        forward = self.training.steps * sum(forward_flops(shape, rows, length) for shape in self.shapes)
        return forward * ((3 if self.recompute else 2) if self.training.backward else MASKS)

    def seconds(self, rates: Rates) -> float:
        return self.flops() / (TRAINING_SHARE[self.training.backward] * rates.matmul)

    def device_bytes(self) -> int:
        return self.memory.peak(self.recompute)
