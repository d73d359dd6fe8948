"""The configuration of a pruned model, from the dense one and the sizes that each layer keeps."""

from typing import Any

from ..architectures import Family, LayerShape
from .pruned import PRUNED_CLASSES
from .stock import common_fields, find_stock


def pruned_config(
    family: Family, config: Any, shapes: list[LayerShape], o_proj_bias: bool, down_proj_bias: bool
) -> Any:
    """Configuration of the pruned model, for just the tensors that it has.

    A stock class's where one holds the model without biases of zeros beside its own; else `registered_config`.
    """
    stock = find_stock(family, config, shapes, o_proj_bias, down_proj_bias)
    if stock is not None and not stock.zero_biases:
        return stock.config
    return registered_config(family, config, shapes, o_proj_bias, down_proj_bias)


def registered_config(
    family: Family, config: Any, shapes: list[LayerShape], o_proj_bias: bool, down_proj_bias: bool
) -> Any:
    """Configuration of pyprune's registered class of the family, which holds every pruned model.

    Layers that differ are in transformers' `per_layer_config` schema; the global sizes are the maximum over the layers.
    """
    config_class, _, causal_lm_class = PRUNED_CLASSES[family.name]
    return config_class(
        **layered_fields(family, config, shapes),
        architectures=[causal_lm_class.__name__],
        o_proj_bias=o_proj_bias,
        down_proj_bias=down_proj_bias,
    )


def layered_fields(family: Family, config: Any, shapes: list[LayerShape]) -> dict[str, Any]:
    """Configuration fields of the whole model and of layers whose sizes are not the largest."""
    sizes = [family.layer_sizes(shape) for shape in shapes]
    names = dict.fromkeys(name for own in sizes for name in own)
    largest = {name: max(own[name] for own in sizes if name in own) for name in names}
    per_layer = {
        layer: {name: value for name, value in own.items() if value != largest[name]} for layer, own in enumerate(sizes)
    }
    differing = {layer: own for layer, own in per_layer.items() if own}
    fields = common_fields(family, config, shapes[0]) | largest
    if differing:
        fields |= {"per_layer_config": differing, "allow_global_per_layer_attribute_access": True}
    return fields
