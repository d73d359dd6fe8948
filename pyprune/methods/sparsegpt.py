from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..architectures import Family
from ..errors import InputError
from ..ops import inverse_factor, sparsify_
from .registry import register
from .second_order import damping_option
from .weight_sparsity import LinearInputs, SemiStructuredMethod, Sparse


@register
@dataclass(frozen=True)
class SparseGpt(SemiStructuredMethod):
    """SparseGPT: OBS on single weights; the rest of a row makes up for them (arXiv 2301.00774).

    H = 2/N Σ x xᵀ over N windows. An unstructured ratio is met in every block of 128 columns of every linear.
    """

    name = "sparsegpt"
    source = "arXiv 2301.00774 (SparseGPT, Frantar and Alistarh)"
    from_hessian: ClassVar[bool] = True
    damping: float = damping_option()

    @property
    def operators(self) -> tuple[str, ...]:
        return ("hessian", "sparsify")

    def sparsify(
        self, family: Family, inputs: list[LinearInputs], weights: dict[str, Tensor], ratio: float, where: str
    ) -> dict[str, Sparse]:
        found = {}
        for own in inputs:
            assert own.hessian is not None
            parts = [len(weights[name]) for name in own.names]
            energies = [energy(weights[name], own.hessian) for name in own.names]
            factor = inverse_factor(own.hessian, self.damping, f"{where} ({own.names[0]})")
            # Rows of all linears on one input at once: a walk takes the same steps for many rows as for few.
            stacked = torch.cat([weights[name].to(torch.float32) for name in own.names])
            stacked[:, factor.dead] = 0
            losses = sparsify_(stacked, factor.factor, self.zeroed.zeros, self.zeroed.group, ratio, parts)
            if not stacked.isfinite().all():
                raise InputError(
                    f"{where} ({own.names[0]}): the refit overflows float32; raise --damping, or give more calibration "
                    "text"
                )
            for name, weight, loss, whole in zip(
                own.names, stacked.split(parts), losses.split(parts), energies, strict=True
            ):
                found[name] = Sparse(weight, loss.double().sum().item() / whole if whole else 0.0)
        return found


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Σ wᵀ H w over the rows of weight [out, in]: the energy of a linear's output, where H is Σ x xᵀ."""
    rows = weight.to(torch.float32)
    return ((rows @ hessian) * rows).sum(dtype=torch.float64).item()
