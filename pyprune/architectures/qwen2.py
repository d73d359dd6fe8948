"""Qwen2 and Qwen2.5: biases on q, k, v; the sliding window differs by layer (`layer_types`)."""

from .family import Family

QWEN2 = Family(
    name="qwen2",
    prefix="Qwen2",
    sliding=lambda config, layer: config.layer_types[layer] == "sliding_attention",
)
