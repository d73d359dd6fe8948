"""The stock transformers class that holds a uniform model, so that it loads wherever transformers' models do."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..architectures import ATTENTION, BUILT_IN, FFN, GRANITE, MISTRAL, SMOLLM3, Family, LayerShape
from ..architectures.declaration import LINEAR, Rows
from ..errors import InputError

# SeedOss has flags for all biases in transformers, but vLLM (055e47c) builds its o_proj and its FFN without.
OTHERS = (MISTRAL, GRANITE, SMOLLM3)
# Fields that transformers writes by itself, or that described the layers of the model before this pruning.
DERIVED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "o_proj_bias",
    "down_proj_bias",
)

# Attributes that mean the same in every class here.
_SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "dtype",
)


@dataclass(frozen=True)
class Stock:
    """A stock class's configuration and the shapes of the tensors that it asks of the layers, named within them.

    layer_tensors: of each kind of layer. rows: of the matrices, as `Attention.rows` and the FFN's. zero_biases: names
    of those that the model has not: as zeros they leave it as it is.
    """

    family: Family
    config: Any
    layer_tensors: list[dict[str, tuple[int, ...]]]
    rows: Rows
    zero_biases: list[str]

    def fill(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors in the class's shapes: zero rows, columns and biases where there are more of them.

        A KV group of zeros has values of zero, an FFN channel of zeros goes into a column of zeros: neither contributes
        anything.
        """
        some = next(iter(tensors.values()))
        filled: dict[str, Tensor] = {}
        for name, shape in self.tensors_of(tensors).items():
            if name not in tensors:
                filled[name] = some.new_zeros(shape)
            elif tensors[name].shape == shape:
                filled[name] = tensors[name]
            else:
                widths = self.rows.get(name.rpartition(".")[0], (1,))
                filled[name] = _padded(tensors[name], shape, widths)
        return filled

    def tensors_of(self, tensors: Collection[str]) -> dict[str, tuple[int, ...]]:
        """What the class asks of a layer that has these tensors."""
        return next(own for own in self.layer_tensors if set(tensors) <= own.keys())


def _padded(tensor: Tensor, shape: tuple[int, ...], widths: tuple[int, ...]) -> Tensor:
    """Zeros behind each block of rows, whose lengths are as `widths`, and behind the columns, up to `shape`."""
    parts = []
    for part, width in zip(tensor.split([len(tensor) * w // sum(widths) for w in widths]), widths, strict=True):
        goal = (shape[0] * width // sum(widths), *shape[1:])
        missing = [n - m for n, m in zip(goal, part.shape, strict=True)]
        # F.pad counts dimensions from the last one, each with what comes before it and after it.
        parts.append(nn.functional.pad(part, [n for count in reversed(missing) for n in (0, count)]))
    return torch.cat(parts)


def common_fields(family: Family, config: Any, shape: LayerShape) -> dict[str, Any]:
    """Everything that a configuration says of the model as a whole, with the sizes of `shape`."""
    common = {name: value for name, value in config.to_dict().items() if name not in DERIVED}
    return common | family.layer_sizes(shape) | {"head_dim": shape.head_dim}


def find_stock(
    family: Family, config: Any, shapes: list[LayerShape], o_proj_bias: bool, down_proj_bias: bool
) -> Stock | None:
    """Find the first stock class that computes the model: the family's, Mistral's, Granite's, SmolLM3's.

    Of a family of another package it is the own one alone: equal names of tensors need not mean equal layers.
    `config` is the model's configuration before this pruning, `shapes` what each layer has afterwards; the flags say
    which output projections have a bias then. None where layers differ, or where no class has the model's tensors: of
    the known families that is Qwen3 with a bias on down_proj, whose norms of queries and keys no class has together
    with it.
    """
    if not alike(shapes):
        return None
    shape = max(shapes, key=lambda own: own.kv_groups)  # of those that have heads, if any has
    kinds = {family.kind(config, layer) == LINEAR: layer for layer in range(len(shapes))}
    needed = [set(family.layer_state_shapes(config, layer)) for layer in kinds.values()]
    flags = ((ATTENTION, o_proj_bias), (FFN, down_proj_bias))
    added = {family.output_proj(sublayer) + ".bias" for sublayer, biased in flags if biased}
    needed = [own | {name for name in added if name.removesuffix("bias") + "weight" in own} for own in needed]
    plain = family in BUILT_IN and family.like_llama and family.computes_llama(config)
    others = [other for other in OTHERS if other.name != family.name] if plain else []
    for candidate in (family, *others):
        stock = _in_class(candidate, family, config, shape, [*kinds.values()], needed)
        if stock is not None:
            return stock
    return None


def stock_config(
    family: Family, config: Any, shapes: list[LayerShape], o_proj_bias: bool, down_proj_bias: bool
) -> Stock:
    """Find the stock class as `find_stock`. InputError where there is none: the reason, and what would work."""
    for layer, shape in enumerate(shapes):
        if not alike([shapes[0], shape]):
            raise InputError(
                f"layer {layer} has {_describe(shape)}, layer 0 has {_describe(shapes[0])}: a stock class needs the "
                "same in every layer; prune with --uniform, or choose another format"
            )
    stock = find_stock(family, config, shapes, o_proj_bias, down_proj_bias)
    heads, width = shapes[0].heads, shapes[0].head_dim
    if stock is None and not family.heads_in_stock and heads * width != shapes[0].hidden_size:
        raise InputError(
            f"transformers' {family.causal_lm_class.__name__} makes heads as wide as the hidden size over their "
            f"number, and cannot have {heads} of {width}: prune with --units channels, or choose another format"
        )
    if stock is None:
        raise InputError(
            f"no stock class has the biases of this {family.prefix} model together with its norms of queries and "
            "keys; prune with --method obs --compensation weights, or choose another format"
        )
    return stock


def _describe(shape: LayerShape) -> str:
    return f"{shape.kv_groups} KV groups and {shape.intermediate_channels} FFN channels"


def alike(shapes: list[LayerShape]) -> bool:
    """Whether one size describes all layers; those without heads need none of the heads'."""
    heads = {(s.kv_groups, s.heads_per_group, s.head_dim) for s in shapes if s.kv_groups}
    return len(heads) < 2 and len({s.intermediate_channels for s in shapes}) == 1


def _fields_beside(candidate: Family, config: Any, shape: LayerShape, sliding: list[bool]) -> dict[str, Any]:
    """Fields with which another family's class computes what Llama's does, windows in the layers that have one."""
    if candidate is GRANITE:
        return {"attention_multiplier": shape.head_dim**-0.5}
    if candidate is SMOLLM3:
        return {
            "no_rope_layers": [1 for _ in sliding],  # 1: the layer has rotary embeddings
            "use_sliding_window": any(sliding),
            "sliding_window": config.sliding_window if any(sliding) else None,
            "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in sliding],
        }
    return {"sliding_window": None} if candidate is MISTRAL else {}


def _in_class(
    candidate: Family,
    family: Family,
    config: Any,
    shape: LayerShape,
    layers_of_kinds: list[int],
    needed: list[set[str]],
) -> Stock | None:
    """The model in one class, or None where that lacks a tensor or a sliding window of it.

    needed: names of the tensors that the model has in one layer of each kind, `layers_of_kinds`.
    """
    layers = range(config.num_hidden_layers)
    sliding = [family.sliding(config, layer) for layer in layers]
    own = candidate.name == family.name
    fields = common_fields(family, config, shape)
    if not candidate.heads_in_stock and shape.heads * fields.pop("head_dim") != shape.hidden_size:
        return None
    if not own:
        fields = {name: fields[name] for name in (*_SHARED, *candidate.sizes, "head_dim") if name in fields}
    biased = {name.split(".")[0] for own in needed for name in own if name.endswith(".bias")}
    attention, ffn = (candidate.output_proj(sublayer).split(".")[0] for sublayer in (ATTENTION, FFN))
    switches = {"attention_bias": attention in biased, "mlp_bias": ffn in biased}
    fields |= {name: on for name, on in switches.items() if name in candidate.config_class.__dataclass_fields__}
    if not own:
        fields |= _fields_beside(candidate, config, shape, sliding)
    try:
        made = candidate.config_class(**fields, architectures=[candidate.causal_lm_class.__name__])
    except StrictDataclassError:  # some classes insist on a hidden size that the heads divide, whatever head_dim says
        return None
    if [candidate.sliding(made, layer) for layer in layers] != sliding:
        return None
    tensors = [candidate.layer_state_shapes(made, layer) for layer in layers_of_kinds]
    rows = candidate.attention.rows(shape) | candidate.ffn.rows()
    spare = []
    for there, names in zip(tensors, needed, strict=True):
        for sublayer in shape.sublayers:
            columns = there.get(candidate.output_proj(sublayer) + ".weight", (0, 0))[1]
            if columns not in (0, shape.units(sublayer) * shape.unit_width(sublayer)):
                return None  # its heads are as wide as the hidden size says
        if names - there.keys() or not all(name.endswith(".bias") for name in there.keys() - names):
            return None
        spare += sorted(there.keys() - names)
    return Stock(candidate, made, tensors, rows, spare)
