"""The smaller layer: slices of the kept units and, where a method compensates, biases on the output projections."""

import torch
from torch import Tensor, nn

from ..allocation.budget import Kept
from ..architectures import FFN, SUBLAYERS, Family, LayerShape, expand


def rewrite_layer(
    family: Family,
    tensors: dict[str, Tensor],
    shape: LayerShape,
    kept: Kept,
    bias: dict[str, Tensor],
    weight: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tensors of the pruned layer, where `tensors` are: kept rows and columns as they were, other tensors untouched.

    `weight` holds, by sublayer, the output projection's new weight ([hidden_size, kept channels], any device), stored
    in the old one's type. `bias` holds, by sublayer, what is added to the output projection's bias ([hidden_size]
    float32); a bias made here stays float32 in the checkpoint whatever the weights are, since rounding it would cost
    quality and saves nothing. On a CPU everything is a copy: nothing keeps the file mapped that `tensors` are views of.
    """
    pruned: dict[str, Tensor] = {}
    for sublayer in SUBLAYERS:
        if len(kept[sublayer]) == shape.units(sublayer):
            continue
        # Once to the device: each copy of indices waits for what the device is at.
        units = kept[sublayer].to(next(iter(tensors.values())).device)
        for name, (dimension, index) in family.unit_slices(shape, sublayer, units).items():
            for suffix in (".weight", ".bias"):
                if name + suffix in tensors and (suffix == ".weight" or dimension == 0):
                    tensor = tensors[name + suffix]
                    pruned[name + suffix] = tensor.index_select(dimension, index)
    for sublayer, new in (weight or {}).items():
        name = family.output_proj(sublayer) + ".weight"
        pruned[name] = new.to(tensors[name].device, tensors[name].dtype)
    for name, tensor in tensors.items():
        if name not in pruned:
            pruned[name] = tensor.clone() if tensor.device.type == "cpu" else tensor
    for sublayer in SUBLAYERS:
        if sublayer in bias:
            name = family.output_proj(sublayer) + ".bias"
            device = tensors[family.output_proj(sublayer) + ".weight"].device
            own = tensors[name].float() if name in tensors else torch.zeros(shape.hidden_size, device=device)
            pruned[name] = own + bias[sublayer].to(device)
    return pruned


def pad_channels(family: Family, tensors: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The layer with FFN channels of zero weights added up to `channels`: the same function, in a rounder size.

    A matrix product on tensor cores whose sizes are no multiples of 8 takes three times as long (13824 channels cut
    to 11059 on an H200).
    """
    padded = dict(tensors)
    output_proj = family.output_proj(FFN) + ".weight"
    more = channels - tensors[output_proj].shape[1]
    if more:
        padded[output_proj] = nn.functional.pad(tensors[output_proj], (0, more))
        for name, widths in family.ffn.rows().items():
            for full in (name + ".weight", name + ".bias"):
                if full in tensors:
                    blocks = tensors[full].chunk(len(widths))
                    ends = (0, 0, 0, more) if blocks[0].dim() == 2 else (0, more)
                    padded[full] = torch.cat([nn.functional.pad(block, ends) for block in blocks])
    return padded


def compensation_bias(weight: Tensor, mean: Tensor, kept: Tensor, width: int) -> Tensor:
    """b = W_:S m_S, S the removed channels: what they contributed on average (FLAP, arXiv 2312.11983, eq. 6).

    weight [out, in] any float type and device; mean float32 [in]; kept unit indices; width channels a unit.
    Returns float32 [out] on the CPU.
    """
    removed = mean.to(weight.device, torch.float32).clone()
    removed[expand(kept, width).to(weight.device)] = 0
    # In memory of its own: the sum's last bits depend on the alignment, and a file's tensors lie anywhere.
    return (weight.to(torch.float32, copy=True) @ removed).cpu()
