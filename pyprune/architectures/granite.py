"""Granite 3 and 4 (dense): Llama's layers with factors of embeddings, sublayers, attention and logits."""

from typing import Any

from .declaration import Scales
from .family import Family


def has_no_factors(config: Any) -> bool:
    """Whether every factor is the one that Llama has."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)
    return factors == (1, 1, 1) and config.attention_multiplier == head_dim**-0.5


GRANITE = Family(
    name="granite",
    prefix="Granite",
    scales=Scales(
        embed=lambda config, rows: rows * config.embedding_multiplier,
        residual=lambda config: float(config.residual_multiplier),
        logits=lambda config, logits: logits / config.logits_scaling,
    ),
    computes_llama=has_no_factors,
    gguf=("llama", "deci"),
    remote_code=True,
    vllm=True,
)
