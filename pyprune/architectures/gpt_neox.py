"""GPT-NeoX and Pythia: LayerNorms, biases everywhere, query, key and value of each head together in one matrix,
attention and FFN side by side behind a norm each where `use_parallel_residual` says so."""

from typing import Any

from ..errors import InputError
from .declaration import LAYER, OTHER_ROTARY, Attention, Plain, Wiring
from .family import Family


def check_head_dim(config: Any) -> None:
    """InputError: a stock class reads `head_dim` for its rotary embeddings and nothing else."""
    width, heads = getattr(config, "head_dim", None), config.num_attention_heads
    if width is not None and not config.model_type.startswith("pyprune_") and width * heads != config.hidden_size:
        raise InputError(f"head_dim in config.json is {width}, but {heads} heads share {config.hidden_size} channels")


GPT_NEOX = Family(
    name="gpt_neox",
    prefix="GPTNeoX",
    classes={"DecoderLayer": "Layer"},
    layers="gpt_neox.layers",
    embeddings="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm.weight",
    attention=Attention(fused="attention.query_key_value", interleaved=True, output="attention.dense"),
    ffn=Plain(up="mlp.dense_h_to_4h", output="mlp.dense_4h_to_h"),
    parallel_wiring=Wiring(parallel=True),
    norm=LAYER,
    rotary=OTHER_ROTARY,
    sizes=("num_attention_heads", None, "intermediate_size"),
    heads_in_stock=False,
    check=check_head_dim,
)
