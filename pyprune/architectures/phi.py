"""Phi-1, Phi-1.5 and Phi-2: attention and FFN side by side behind one LayerNorm, biases everywhere."""

from typing import Any

from ..errors import InputError
from .cohere import SIDE_BY_SIDE
from .declaration import LAYER, Attention, Plain
from .family import Family


def check_norms(config: Any) -> None:
    """InputError: norms of heads, which transformers makes as wide as the hidden size over the number of heads."""
    if config.qk_layernorm:
        raise InputError("qk_layernorm in config.json: phi models with it are not supported")


PHI = Family(
    name="phi",
    prefix="Phi",
    final_norm="model.final_layernorm.weight",
    attention=Attention(output="self_attn.dense"),
    ffn=Plain(up="mlp.fc1", output="mlp.fc2"),
    wiring=SIDE_BY_SIDE,
    norm=LAYER,
    check=check_norms,
)
