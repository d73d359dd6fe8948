from dataclasses import dataclass
from typing import Any, ClassVar

from ..architectures import Family, LayerShape
from ..errors import InputError
from ..mask_training.budget import check_selections, most_selected_away
from ..mask_training.gates import GATES
from .base import compensation_option
from .mask_learning import LearnedMethod
from .options import option
from .registry import register

WARM_STARTS = ("gradients", "moments", "none")


@register
@dataclass(frozen=True)
class Disp(LearnedMethod):
    """DISP-LLM: each block learns which channels of the residual stream it reads and writes (arXiv 2410.11988).

    `gate`: reinmax, or gumbel as in the authors' code. `budget_weight` is λ. `warm_start`: gates begin at what each is
    worth by the squares of its gradients or of its values (`warm_windows` windows), or all open as in the paper.
    `compensation` weights: the output projections are refitted afterwards.
    """

    name = "disp"
    source = "arXiv 2410.11988 (DISP-LLM, Gao et al.)"
    procedure: ClassVar[str] = "train-selections"
    round_to: int = option(
        1,
        minimum=1,
        help="Every selection keeps a multiple of this many channels.",
        meaning="it is a number of channels",
    )
    compensation: str = compensation_option("none", "weights")
    gate: str = option("reinmax", choices=tuple(GATES), help="How gradients pass the gates.")
    budget_weight: float = option(6.0, above=0, help="Weight of |ln(kept / asked)| beside the loss.")
    warm_start: str = option("gradients", choices=WARM_STARTS, help="What gates begin at; none: all open.")
    warm_windows: int = option(32, minimum=1, help="Calibration windows that the warm start looks at.")

    @property
    def operators(self) -> tuple[str, ...]:
        return ("hessian",) if self.compensation == "weights" else ()

    @property
    def backward(self) -> bool:
        return True

    def most_removable(self, shapes: list[LayerShape]) -> float:
        return most_selected_away(shapes, self.round_to)

    def check_layers(self, family: Family, config: Any) -> None:
        if not (family.selects_channels and family.computes_llama(config)):
            raise InputError(
                f"disp selects channels of the residual stream for layers wired as Llama's; {family.name} models are "
                "not, as their config.json has them: take obs, flap or slimgpt"
            )

    def check(self, shapes: list[LayerShape], ratio: float) -> None:
        check_selections(shapes, ratio, self.round_to)
