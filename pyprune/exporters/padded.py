"""A checkpoint whose layers differ, padded with zeros to the widest, in a stock class: to evaluate it, not to run it.

It computes what the pruned model computes, in whatever takes transformers' models, at the cost of the widest layer in
every layer.
"""

from ..architectures import LayerShape
from ..checkpoint import CheckpointReader
from ..errors import InputError
from ..modeling.stock import stock_config
from .layout import Layout
from .stock import output_proj_biases


def padded_layout(reader: CheckpointReader) -> Layout:
    """InputError where no stock class holds the model's tensors."""
    widest = widest_shape(reader.shapes)
    stock = stock_config(reader.family, reader.config, [widest] * reader.layers, **output_proj_biases(reader))
    ratio = sum(shape.parameters for shape in reader.shapes) / (widest.parameters * reader.layers)
    note = f"for evaluation only: {1 - ratio:.1%} of the decoder linears is padding, which costs memory and time"
    return Layout(stock.config, stock.fill, notes=(note,))


def widest_shape(shapes: list[LayerShape]) -> LayerShape:
    """The largest number of KV groups and of FFN channels. InputError where query heads per group differ."""
    for layer, shape in enumerate(shapes):
        if shape.heads_per_group != shapes[0].heads_per_group:
            raise InputError(
                f"layer {layer} has {shape.heads_per_group} query heads in a KV group, layer 0 has "
                f"{shapes[0].heads_per_group}: padding cannot make them alike"
            )
    return shapes[0].kept(max(s.kv_groups for s in shapes), max(s.intermediate_channels for s in shapes))
