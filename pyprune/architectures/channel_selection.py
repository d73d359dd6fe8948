"""Selections of the residual stream: which channels each block of a layer reads and writes (DISP-LLM, 2410.11988).

The residual stream, the norms, the embeddings and the heads stay whole. A layer has five selections, independent of
each other and of the other layers':

attention_in   channels of the first norm's output that q, k and v read          of hidden_size
attention_out  channels of the residual stream that o adds to                    of hidden_size
ffn_in         channels of the second norm's output that gate and up read        of hidden_size
ffn_middle     FFN channels                                                      of intermediate_channels
ffn_out        channels of the residual stream that down adds to                 of hidden_size
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from . import ATTENTION, FFN, Family, LayerShape

ATTENTION_IN = "attention_in"
ATTENTION_OUT = "attention_out"
FFN_IN = "ffn_in"
FFN_MIDDLE = "ffn_middle"
FFN_OUT = "ffn_out"
SELECTIONS = (ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_MIDDLE, FFN_OUT)

ChannelSelection = dict[str, Tensor]  # of one layer: name -> sorted indices of the channels that stay, int64

Count = TypeVar("Count", int, float, Tensor)


def width(shape: LayerShape, name: str) -> int:
    """Number of channels that a selection chooses from."""
    return shape.intermediate_channels if name == FFN_MIDDLE else shape.hidden_size


def selected_parameters(shape: LayerShape, counts: Mapping[str, Count]) -> Count:
    """Parameters of a layer's decoder linears with these numbers of channels in each selection; whole or not.

    q, k and v: counts[attention_in] · (heads + 2 KV heads) · head_dim; o: counts[attention_out] · heads · head_dim;
    gate and up: 2 · counts[ffn_in] · counts[ffn_middle]; down: counts[ffn_middle] · counts[ffn_out].
    """
    query = shape.kv_groups * shape.group_width
    key_value = shape.kv_groups * shape.head_dim
    return (
        counts[ATTENTION_IN] * (query + 2 * key_value)
        + counts[ATTENTION_OUT] * query
        + counts[FFN_MIDDLE] * (2 * counts[FFN_IN] + counts[FFN_OUT])
    )


def slices(family: Family) -> dict[str, tuple[tuple[int, str], ...]]:
    """Map the names of matrices to the (dimension, selection) pairs that cut them.

    Dimension 0: output rows (and the bias); dimension 1: input columns.
    """
    return {
        **dict.fromkeys(family.input_projs(ATTENTION), ((1, ATTENTION_IN),)),
        family.output_proj(ATTENTION): ((0, ATTENTION_OUT),),
        **dict.fromkeys(family.input_projs(FFN), ((0, FFN_MIDDLE), (1, FFN_IN))),
        family.output_proj(FFN): ((0, FFN_OUT), (1, FFN_MIDDLE)),
    }


def select_layer(family: Family, tensors: Mapping[str, Tensor], selection: ChannelSelection) -> dict[str, Tensor]:
    """The layer's tensors, named within the layer, with what is not selected cut out; the others as they are."""
    cut = slices(family)
    selected = {}
    for name, tensor in tensors.items():
        matrix, _, _ = name.rpartition(".")
        for dimension, which in cut.get(matrix, ()):
            if dimension < tensor.dim():  # a bias has rows only
                tensor = tensor.index_select(dimension, selection[which].to(tensor.device))
        selected[name] = tensor
    return selected
