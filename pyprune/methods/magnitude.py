from dataclasses import dataclass

from torch import Tensor

from ..calibration.channel_statistics import ChannelStatistics
from .base import ScoringMethod
from .registry import register


@register
@dataclass(frozen=True)
class Magnitude(ScoringMethod):
    """Magnitude-sp: the norm of each output projection column, uniform over layers; looks at no text (baseline)."""

    name = "magnitude"
    source = "a baseline: the norm of a channel's weights alone"
    needs_text = False

    def channel_scores(self, statistics: ChannelStatistics, sublayer: str) -> Tensor:
        """‖W_:j‖₂."""
        return statistics.weight_squares.double().sqrt()
