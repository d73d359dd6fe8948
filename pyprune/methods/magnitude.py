from dataclasses import dataclass

from torch import Tensor

from ..calibration.channel_statistics import DriverStatistics
from .base import ScoringMethod


@dataclass(frozen=True)
class Magnitude(ScoringMethod):
    """Magnitude-sp: the norm of each driver column, uniform over layers; looks at no text (baseline)."""

    name = "magnitude"
    needs_text = False

    def channel_scores(self, statistics: DriverStatistics, module: str) -> Tensor:
        """‖W_:j‖₂."""
        return statistics.weight_squares.double().sqrt()
