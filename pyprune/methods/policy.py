from dataclasses import dataclass
from typing import ClassVar

from ..architectures import SUBLAYERS, LayerShape
from ..errors import InputError
from .base import ScoringMethod, compensation_option
from .flap import Flap
from .mask_learning import LearnedMethod, learning_rate_option
from .options import option
from .registry import register
from .wanda_sp import WandaSp

STARTS = ("flap", "wanda-sp")


@register
@dataclass(frozen=True)
class Policy(LearnedMethod):
    """Bypass Back-propagation: learned keep-probabilities of KV groups and FFN channels (2406.10576).

    Forward passes only, over the whole model: no layer has a size of its own. `compensation` bias: as FLAP's, from the
    dense model; the masks are learned without it, and on 24M models it made them worse.
    """

    name = "policy"
    source = "arXiv 2406.10576 (Bypass Back-propagation, Gao et al.)"
    procedure: ClassVar[str] = "train-units"
    learning_rate: float = learning_rate_option(0.02, "Adam")
    compensation: str | None = compensation_option("none", "bias")
    start: str = option("flap", choices=STARTS, help="Whose scores the probabilities begin at.")

    @property
    def adds_bias(self) -> bool:
        return self.compensation == "bias"

    @property
    def operators(self) -> tuple[str, ...]:
        return ("channel_moments",)

    @property
    def backward(self) -> bool:
        return False

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        if any(shape.fixed or len(shape.sublayers) < len(SUBLAYERS) for shape in shapes):
            raise InputError("policy needs KV groups that may go in every layer, which these layers do not have")
        super().check(shapes, ratio)

    @property
    def scoring(self) -> ScoringMethod:
        """Scoring method that gives the initial probabilities."""
        return Flap(compensation="none") if self.start == "flap" else WandaSp()
