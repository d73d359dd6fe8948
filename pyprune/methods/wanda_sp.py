from dataclasses import dataclass

from torch import Tensor

from ..calibration.channel_statistics import ChannelStatistics
from .base import ScoringMethod
from .registry import register


@register
@dataclass(frozen=True)
class WandaSp(ScoringMethod):
    """Wanda-sp: mean weight times input norm, uniform over layers, on pruned inputs (baseline)."""

    name = "wanda-sp"
    source = "arXiv 2306.11695 (Wanda), summed over channels as a baseline in arXiv 2312.11983"
    sequential = True

    def channel_scores(self, statistics: ChannelStatistics, sublayer: str) -> Tensor:
        """mean_o |W_oj| * sqrt(s_j), s_j = (1/N) Σ_tokens x_j² (arXiv 2306.11695 by column; 2312.11983 §4)."""
        return statistics.weight_mean.double() * statistics.input_squares().sqrt()
