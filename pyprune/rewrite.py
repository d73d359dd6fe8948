"""The smaller layer: slices of the kept units and, where a method compensates, biases on the drivers."""

import torch
from torch import Tensor

from .allocation import Kept
from .architectures import MODULES, Family, LayerShape, expand


def rewrite_layer(
    family: Family,
    tensors: dict[str, Tensor],
    shape: LayerShape,
    kept: Kept,
    bias: dict[str, Tensor],
    weight: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tensors of the pruned layer: kept rows and columns as they were, other tensors untouched.

    `weight` holds, by module, the driver's new weight ([hidden_size, kept channels], any device), stored in the old
    one's type.
    `bias` holds, by module, what is added to the driver's bias ([hidden_size] float32); a bias made here stays
    float32 in the checkpoint whatever the weights are, since rounding it would cost quality and saves nothing.
    Everything is a copy: nothing keeps the file mapped that `tensors` are views of.
    """
    pruned: dict[str, Tensor] = {}
    for module in MODULES:
        for name, (dimension, index) in family.unit_rows(shape, module, kept[module]).items():
            for suffix in (".weight", ".bias"):
                if name + suffix in tensors and (suffix == ".weight" or dimension == 0):
                    pruned[name + suffix] = tensors[name + suffix].index_select(dimension, index)
    for module, new in (weight or {}).items():
        name = family.driver(module) + ".weight"
        pruned[name] = new.to("cpu", tensors[name].dtype)
    pruned |= {name: tensor.clone() for name, tensor in tensors.items() if name not in pruned}
    for module in MODULES:
        if module in bias:
            name = family.driver(module) + ".bias"
            own = tensors[name].float() if name in tensors else torch.zeros(shape.hidden_size)
            pruned[name] = own + bias[module].cpu()
    return pruned


def compensation_bias(weight: Tensor, mean: Tensor, kept: Tensor, width: int) -> Tensor:
    """b = W_:S m_S, S the removed channels: what they contributed on average (FLAP, arXiv 2312.11983, eq. 6).

    weight [out, in] any float type and device; mean float32 [in]; kept unit indices; width channels a unit.
    Returns float32 [out] on the CPU.
    """
    removed = mean.to(weight.device, torch.float32).clone()
    removed[expand(kept, width).to(weight.device)] = 0
    return (weight.float() @ removed).cpu()
