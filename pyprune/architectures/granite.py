"""Granite with multipliers that change nothing: Llama's layers with a bias on every linear."""

from typing import Any

from ..errors import InputError
from .family import Family


def check_multipliers(config: Any) -> None:
    """InputError: an embedding, residual, attention or logit multiplier that Llama's layers do not have."""
    plain = {"embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain |= {"attention_multiplier": head_dim**-0.5}
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise InputError(f"{name} {getattr(config, name)} in config.json: only {value} is supported in granite")


GRANITE = Family(name="granite", prefix="Granite", check=check_multipliers)
