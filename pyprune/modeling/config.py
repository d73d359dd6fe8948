"""The configuration of a pruned model, from the dense one and the sizes that each layer keeps."""

from typing import Any

from ..architectures import Family, LayerShape
from .pruned import PRUNED_CLASSES

_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
# What transformers writes by itself, or what described the layers of the model before this pruning.
_DERIVED = (
    "model_type",
    "architectures",
    "transformers_version",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
    "o_proj_bias",
    "down_proj_bias",
)


def pruned_config(
    family: Family, config: Any, shapes: list[LayerShape], o_proj_bias: bool, down_proj_bias: bool
) -> Any:
    """Configuration of the pruned model.

    The family's stock class when no layer differs and the drivers have no bias that the family does not know;
    else pyprune's registered class with transformers' `per_layer_config` schema, whose global sizes are the
    maximum over the layers.
    """
    sizes = [
        {
            "num_attention_heads": shape.kv_groups * shape.heads_per_group,
            "num_key_value_heads": shape.kv_groups,
            "intermediate_size": shape.intermediate_channels,
        }
        for shape in shapes
    ]
    largest = {name: max(layer[name] for layer in sizes) for name in _SIZES}
    common = {name: value for name, value in config.to_dict().items() if name not in _DERIVED}
    common |= largest | {"head_dim": shapes[0].head_dim}
    uniform = all(layer == largest for layer in sizes)
    if uniform and not o_proj_bias and not down_proj_bias and _stock_accepts(family, common):
        return family.config_class(**common, architectures=[family.causal_lm_class.__name__])

    config_class, _, causal_lm_class = PRUNED_CLASSES[family.name]
    per_layer = {
        layer: {name: value for name, value in own.items() if value != largest[name]} for layer, own in enumerate(sizes)
    }
    return config_class(
        **common,
        architectures=[causal_lm_class.__name__],
        o_proj_bias=o_proj_bias,
        down_proj_bias=down_proj_bias,
        **(
            {}
            if uniform
            else {
                "per_layer_config": {layer: own for layer, own in per_layer.items() if own},
                "allow_global_per_layer_attribute_access": True,
            }
        ),
    )


def _stock_accepts(family: Family, common: dict[str, Any]) -> bool:
    """Llama's own configuration insists on hidden_size % heads == 0 even when head_dim is written out."""
    return family.name != "llama" or common["hidden_size"] % common["num_attention_heads"] == 0
