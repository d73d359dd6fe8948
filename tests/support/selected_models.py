"""Models with selections, made from dense ones; and the dense ones under masks, which compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pyprune.architectures import ATTENTION, FFN, GRANITE, SMOLLM3, Family, LayerShape, family_of
from pyprune.architectures.channel_selection import SELECTIONS, ChannelSelection, select_layer, width
from pyprune.mask_training.masked_model import hook_points, selection_masks
from pyprune.modeling import selected_config
from pyprune.ops.rms_norm import rms_norm_reference
from pyprune.passes.train_masks import index_tensors
from support import families

CPU = torch.device("cpu")
_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 97,
    "pad_token_id": None,
}
# Families that tests/support/families.py has no checkpoint of.
_OTHERS: dict[str, tuple[Family, dict[str, Any]]] = {
    "granite-biases": (GRANITE, {"attention_multiplier": 16**-0.5, "attention_bias": True, "mlp_bias": True}),
    "smollm3-sliding": (
        SMOLLM3,
        {
            "no_rope_layers": [1, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
NAMES = (*families.FAMILIES, *_OTHERS)
Made = tuple[Family, Any, list[ChannelSelection]]


def dense_model(
    name: str, tiny_checkpoint: Callable[..., Path], folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Family, Any]:
    """A family and a random model of it, one of NAMES, with norms and biases that are not trivial."""
    if name in _OTHERS:
        family, changes = _OTHERS[name]
        model = family.causal_lm_class(family.config_class(**_SIZES, **changes)).to(dtype)
    else:
        checkpoint = families.family_checkpoint(name, tiny_checkpoint, folder)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        family = family_of(model.config.model_type)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.2)
    return family, model.eval()


def dense_and_selections(
    tiny_checkpoint: Callable[..., Path],
    folder: Path,
    name: str = "llama-gqa-tied",
    dtype: torch.dtype = torch.float32,
    count: int | None = None,
) -> Made:
    """As `dense_model`, with selections of it at random."""
    family, dense = dense_model(name, tiny_checkpoint, folder, dtype)
    return family, dense, random_selections(family.shapes(dense.config), count=count)


def add_driver_biases(family: Family, model: Any) -> None:
    """A bias on every output projection, as a compensation adds one."""
    generator = torch.Generator().manual_seed(12)
    for block in model.get_submodule(family.layers):
        for module in (ATTENTION, FFN):
            linear = block.get_submodule(family.output_proj(module))
            bias = torch.randn(linear.out_features, generator=generator).to(linear.weight.dtype)
            linear.bias = nn.Parameter(bias)


def random_selections(shapes: list[LayerShape], seed: int = 0, count: int | None = None) -> list[ChannelSelection]:
    """For each layer, sorted channels at random: a third to all of them, or `count` everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def kept(channels: int) -> Tensor:
        n = count or int(torch.randint(channels // 3, channels + 1, (), generator=generator))
        return torch.randperm(channels, generator=generator)[:n].sort().values

    return [{name: kept(width(shape, name)) for name in SELECTIONS} for shape in shapes]


def selected_tensors(family: Family, dense: Any, selections: list[ChannelSelection]) -> dict[str, Tensor]:
    """All tensors of the model with the selections, by full name."""
    layers = dense.get_submodule(family.layers)
    tensors = {name: t for name, t in dense.state_dict().items() if not name.startswith(f"{family.layers}.")}
    for layer, (block, selection) in enumerate(zip(layers, selections, strict=True)):
        own = select_layer(family, block.state_dict(), selection) | index_tensors(selection, CPU)
        tensors |= {f"{family.layers}.{layer}.{name}": t for name, t in own.items()}
    return tensors


def dense_selected_config(family: Family, dense: Any, selections: list[ChannelSelection]) -> Any:
    """The configuration for `selected_tensors`."""
    counts = [{name: len(kept) for name, kept in own.items()} for own in selections]
    block = dense.get_submodule(family.layers)[0]
    biased = (block.get_submodule(family.output_proj(module)).bias is not None for module in (ATTENTION, FFN))
    return selected_config(family, dense.config, counts, *biased)


def selected_model(family: Family, dense: Any, selections: list[ChannelSelection]) -> Any:
    """The materialised model, in the dense one's type."""
    config = dense_selected_config(family, dense, selections)
    model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    model.load_state_dict(selected_tensors(family, dense, selections))
    return model.eval()


def mask_by_selections(family: Family, dense: Any, selections: list[ChannelSelection]) -> None:
    """Have the dense model multiply by masks of 0 and 1 what the materialised one leaves out."""
    shapes = family.shapes(dense.config)
    for block, shape, selection in zip(dense.get_submodule(family.layers), shapes, selections, strict=True):
        masks = selection_masks(shape, selection, CPU, dense.dtype)
        hook_points(block, family, lambda place, value, own=masks: value * own[place] if place in own else value)


def widen_norms(family: Family, model: Any) -> None:
    """Norms that compute in float64 where the model does: transformers' go through float32."""
    for norm in model.modules():
        if isinstance(norm, family.norm_class):
            norm.forward = lambda x, own=norm: rms_norm_reference(x, own.weight, own.variance_epsilon)


def ids(count: int = 2, length: int = 13) -> Tensor:
    """Tokens at random."""
    return torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """[windows, tokens] -> [windows, tokens, vocabulary]."""
    return model(tokens, use_cache=False).logits
