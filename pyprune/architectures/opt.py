"""OPT: LayerNorms, biases everywhere, learned positions, an FFN without a gate in the layer itself."""

from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .declaration import LAYER, NO_ROTARY, Attention, Plain, Wiring
from .family import Family

FIRST_POSITION = 2  # row of the first token: the two before it are the padding's


def check_layers(config: Any) -> None:
    """InputError: norms behind what is added, or embeddings of another width than the layers' (350M)."""
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise InputError("do_layer_norm_before in config.json: opt models without norms before each block (350M)")
    if config.word_embed_proj_dim != config.hidden_size:
        raise InputError("word_embed_proj_dim in config.json: opt models with projected embeddings are not supported")


def run_ffn(block: nn.Module, hidden: Tensor) -> Tensor:
    up, activation, output = (block.get_submodule(name) for name in ("fc1", "activation_fn", "fc2"))
    result: Tensor = output(activation(up(hidden)))
    return result


OPT = Family(
    name="opt",
    prefix="OPT",
    layers="model.decoder.layers",
    embeddings="model.decoder.embed_tokens.weight",
    final_norm="model.decoder.final_layer_norm.weight",
    attention=Attention(output="self_attn.out_proj"),
    ffn=Plain(up="fc1", output="fc2"),
    wiring=Wiring(before=("self_attn_layer_norm", "final_layer_norm")),
    norm=LAYER,
    rotary=NO_ROTARY,
    positions=("model.decoder.embed_positions.weight", FIRST_POSITION),
    sizes=("num_attention_heads", None, "ffn_dim"),
    heads_in_stock=False,
    ffn_forward=run_ffn,
    check=check_layers,
)
