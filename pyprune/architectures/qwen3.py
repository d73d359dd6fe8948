"""Qwen3 (dense): norms over each head's queries and keys, shared by all heads, so they survive pruning unchanged."""

from .family import Family

QWEN3 = Family(
    name="qwen3",
    prefix="Qwen3",
    sliding=lambda config, layer: config.layer_types[layer] == "sliding_attention",
)
