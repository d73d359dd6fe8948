import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..architectures import LayerShape
from ..errors import InputError
from ..mask_training.budget import check_selections
from ..mask_training.gates import GATES
from .base import Method, ScoringMethod
from .flap import Flap
from .wanda_sp import WandaSp

WARM_STARTS = ("gradients", "moments", "none")
STARTS = ("flap", "wanda-sp")


@dataclass(frozen=True)
class LearnedMethod(Method):
    """A method that trains masks on the whole frozen model: it must fit the device.

    `steps` of `rows` windows each; `learning_rate` of AdamW.
    """

    steps: int = 1500
    rows: int = 1
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "rows", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:  # NaN is neither
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is not positive and finite")

    @property
    def sizes_known(self) -> bool:
        return False

    @property
    @abstractmethod
    def backward(self) -> bool:
        """Whether training needs gradients through the model, not forwards alone."""


@dataclass(frozen=True)
class Disp(LearnedMethod):
    """DISP-LLM: each block learns which channels of the residual stream it reads and writes (arXiv 2410.11988).

    `gate`: reinmax, or gumbel as in the authors' code. `budget_weight` is λ. `warm_start`: gates begin at what each is
    worth by the squares of its gradients or of its values (`warm_windows` windows), or all open as in the paper.
    `round_to`: every selection keeps a multiple. `compensation` weights: the output projections are refitted
    afterwards.
    """

    name = "disp"
    compensations: ClassVar[tuple[str, ...]] = ("none", "weights")
    gate: str = "reinmax"
    budget_weight: float = 6.0
    warm_start: str = "gradients"
    warm_windows: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("gate", tuple(GATES))
        self.check_option("warm_start", WARM_STARTS)
        if self.uniform:
            raise InputError("disp has no --uniform: each block selects its own channels; --round-to makes them round")
        for name in ("budget_weight", "warm_windows"):
            if not 0 < getattr(self, name) < math.inf:  # NaN is neither
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is not positive and finite")

    @property
    def operators(self) -> tuple[str, ...]:
        return ("hessian",) if self.compensation == "weights" else ()

    @property
    def backward(self) -> bool:
        return True

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        check_selections(shapes, ratio, self.round_to)


@dataclass(frozen=True)
class Policy(LearnedMethod):
    """Bypass Back-propagation: learned keep-probabilities of KV groups and FFN channels (2406.10576).

    Forward passes only. `start`: whose scores the probabilities begin at. `compensation` bias: as FLAP's, from the
    dense model; the masks are learned without it, and on 24M models it made them worse.
    """

    name = "policy"
    compensations: ClassVar[tuple[str, ...]] = ("none", "bias")
    learning_rate: float = 0.02
    start: str = "flap"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("start", STARTS)
        if self.uniform or self.round_to > 1:
            raise InputError("policy has no --uniform and no --round-to: it learns over the whole model")

    @property
    def operators(self) -> tuple[str, ...]:
        return ("channel_moments",)

    @property
    def backward(self) -> bool:
        return False

    @property
    def scoring(self) -> ScoringMethod:
        """The method whose scores the probabilities begin at."""
        return Flap(compensation="none") if self.start == "flap" else WandaSp()
