"""Qwen3 (dense): norms over each head's queries and keys, shared by all heads, so they survive pruning unchanged."""

from .declaration import SHARED, Attention, by_layer_type
from .family import Family

QWEN3 = Family(
    name="qwen3",
    prefix="Qwen3",
    attention=Attention(head_norms=SHARED),
    kind=by_layer_type,
    gguf=("qwen3", "openelm"),
    remote_code=True,
    vllm=True,
)
