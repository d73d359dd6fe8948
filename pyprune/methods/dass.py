from dataclasses import dataclass

from torch import Tensor

from ..architectures import Family
from .registry import register
from .weight_sparsity import InputNormMethod

# Of the norm of an FFN channel beside a weight of gate or up, as in the paper.
POWER = 0.5


@register
@dataclass(frozen=True)
class Dass(InputNormMethod):
    """DaSS: Wanda whose gate and up also count the norm of their FFN channel (arXiv 2405.01943).

    Of gate and up |W_ij| n_i^0.5, compared along the output axis: weights of an input channel, n_i the norm of the FFN
    channel i. Of the other linears |W_ij| ‖x_j‖₂ within a row, as Wanda's.
    """

    name = "dass"
    source = "arXiv 2405.01943 (DaSS, Guo et al.)"

    def compared_axis(self, family: Family, name: str) -> int:
        return 0 if name in family.ffn.inputs else 1

    def channel_factor(self, family: Family, name: str, own: Tensor, middle: Tensor) -> Tensor:
        return middle.pow(POWER)[:, None] if name in family.ffn.inputs else own
