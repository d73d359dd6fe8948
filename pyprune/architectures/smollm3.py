"""SmolLM3 with rotary embeddings in every layer: Llama's layers with biases and a sliding window by layer."""

from typing import Any

from ..errors import InputError
from .family import Family


def check_rotary(config: Any) -> None:
    """InputError: a layer without rotary embeddings, as the published models have every fourth."""
    if not all(config.no_rope_layers):
        raise InputError("layers without rotary embeddings (no_rope_layers in config.json) are not supported")


SMOLLM3 = Family(
    name="smollm3",
    prefix="SmolLM3",
    sliding=lambda config, layer: config.layer_types[layer] == "sliding_attention",
    check=check_rotary,
)
