"""The stock transformers class that holds a uniform model, so that it loads wherever transformers' models do."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..architectures import ATTENTION, BUILT_IN, FFN, GRANITE, LLAMA, MISTRAL, SMOLLM3, Family, LayerShape
from ..errors import InputError

# SeedOss has flags for all biases in transformers, but vLLM (055e47c) builds its o_proj and its FFN without.
OTHERS = (MISTRAL, GRANITE, SMOLLM3)
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
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
    """A stock class's configuration and the shapes of the tensors that it asks of every layer, named within it.

    `zero_biases` names those that the model has not: as zeros they leave it as it is.
    """

    family: Family
    config: Any
    layer_tensors: dict[str, tuple[int, ...]]
    zero_biases: list[str]

    def fill(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors in the class's shapes: zero rows, columns and biases where there are more of them.

        A KV group of zeros has values of zero, an FFN channel of zeros is silu(0) · 0: neither contributes anything.
        Whole groups are contiguous in q, k, v and o, so all padding is at the end of a dimension.
        """
        query = tensors[self.family.query + ".weight"]
        filled: dict[str, Tensor] = {}
        for name, shape in self.layer_tensors.items():
            if name not in tensors:
                filled[name] = query.new_zeros(shape)
            elif tensors[name].shape == shape:
                filled[name] = tensors[name]
            else:
                missing = [n - m for n, m in zip(shape, tensors[name].shape, strict=True)]
                # F.pad counts dimensions from the last one, each with what comes before it and after it.
                filled[name] = nn.functional.pad(tensors[name], [n for count in reversed(missing) for n in (0, count)])
        return filled


def layer_sizes(shape: LayerShape) -> dict[str, int]:
    """The sizes of a layer under transformers' names."""
    return {
        "num_attention_heads": shape.kv_groups * shape.heads_per_group,
        "num_key_value_heads": shape.kv_groups,
        "intermediate_size": shape.intermediate_channels,
    }


def common_fields(config: Any, shape: LayerShape) -> dict[str, Any]:
    """Everything that a configuration says of the model as a whole, with the sizes of `shape`."""
    common = {name: value for name, value in config.to_dict().items() if name not in DERIVED}
    return common | layer_sizes(shape) | {"head_dim": shape.head_dim}


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
    if any(shape != shapes[0] for shape in shapes):
        return None
    needed = set(family.layer_state_shapes(config, 0))
    flags = ((ATTENTION, o_proj_bias), (FFN, down_proj_bias))
    needed |= {family.output_proj(sublayer) + ".bias" for sublayer, biased in flags if biased}
    others = [other for other in OTHERS if other.name != family.name] if family in BUILT_IN else []
    for candidate in (family, *others):
        stock = _in_class(candidate, family, config, shapes[0], needed)
        if stock is not None:
            return stock
    return None


def stock_config(
    family: Family, config: Any, shapes: list[LayerShape], o_proj_bias: bool, down_proj_bias: bool
) -> Stock:
    """Find the stock class as `find_stock`. InputError where there is none: the reason, and what would work."""
    for layer, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise InputError(
                f"layer {layer} has {_describe(shape)}, layer 0 has {_describe(shapes[0])}: a stock class needs the "
                "same in every layer; prune with --uniform, or choose another format"
            )
    stock = find_stock(family, config, shapes, o_proj_bias, down_proj_bias)
    if stock is None:
        raise InputError(
            f"no stock class has the biases of this {family.prefix} model together with its norms of queries and "
            "keys; prune with --method obs --compensation weights, or choose another format"
        )
    return stock


def _describe(shape: LayerShape) -> str:
    return f"{shape.kv_groups} KV groups and {shape.intermediate_channels} FFN channels"


def _in_class(candidate: Family, family: Family, config: Any, shape: LayerShape, needed: set[str]) -> Stock | None:
    """The model in one class, or None where that lacks a tensor or a sliding window of it."""
    layers = range(config.num_hidden_layers)
    sliding = [family.sliding(config, layer) for layer in layers]
    own = candidate.name == family.name
    # LlamaConfig insists on it even when head_dim is written out (transformers 5); the others do not look.
    if candidate.name == LLAMA.name and shape.hidden_size % (shape.kv_groups * shape.heads_per_group):
        return None
    fields = common_fields(config, shape)
    if not own:
        fields = {name: fields[name] for name in (*_SHARED, *SIZES, "head_dim") if name in fields}
    biased = {name.split(".")[0] for name in needed if name.endswith(".bias")}
    switches = {"attention_bias": "self_attn" in biased, "mlp_bias": "mlp" in biased}
    fields |= {name: on for name, on in switches.items() if name in candidate.config_class.__dataclass_fields__}
    if candidate is GRANITE:
        fields |= {"attention_multiplier": shape.head_dim**-0.5}
    elif candidate is SMOLLM3:
        fields |= {
            "no_rope_layers": [1 for _ in layers],  # 1: the layer has rotary embeddings
            "use_sliding_window": any(sliding),
            "sliding_window": config.sliding_window if any(sliding) else None,
            "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in sliding],
        }
    elif candidate is MISTRAL and not own:
        fields |= {"sliding_window": None}
    made = candidate.config_class(**fields, architectures=[candidate.causal_lm_class.__name__])
    if [candidate.sliding(made, layer) for layer in layers] != sliding:
        return None
    tensors = candidate.layer_state_shapes(made, 0)
    missing, spare = needed - tensors.keys(), tensors.keys() - needed
    if missing or not all(name.endswith(".bias") for name in spare):
        return None
    return Stock(candidate, made, tensors, sorted(spare))
