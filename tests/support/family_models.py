"""One small random model of every family: factors, biases, windows and norms that are not the default's."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pyprune.architectures import FAMILIES, Family

VOCABULARY = 96
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
# The heads of these classes are hidden_size / heads wide.
_FIXED = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": None}
_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# By family, what is not the default's of its class.
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, **_MIXED},
    "qwen3": {"use_sliding_window": True, "attention_bias": True, **_MIXED},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 8.0,
        "attention_bias": True,
    },
    "smollm3": {"no_rope_layers": [0, 1], "use_sliding_window": True, **_MIXED},
    "ministral": _MIXED,
    "ministral3": {"sliding_window": 16},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "apertus": {"attention_bias": True},
    "cwm": _MIXED,
    "arcee": {"mlp_bias": True, "attention_bias": True},
    "phi3": {"original_max_position_embeddings": 256, "sliding_window": 16},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 12},
    "olmo": {"clip_qkv": 1.0, "attention_bias": True},
    "olmo2": {"attention_bias": True},
    "olmo3": _MIXED,
    "exaone4": _MIXED,
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True, "attention_bias": True},
    "cohere2": {**_MIXED, "logit_scale": 0.25},
    "starcoder2": {"sliding_window": 16, "use_bias": True},
    "stablelm": {"use_qkv_bias": True, **_FIXED, "rope_parameters": _HALF},
    "gpt_neox": {
        "num_attention_heads": 6,
        "head_dim": None,
        "rope_parameters": _HALF,
    },
    "opt": {"ffn_dim": 64, "num_attention_heads": 6, "tie_word_embeddings": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
# By family that GGUF is written for, what makes its small model one that llama.cpp holds.
LIKE_LLAMA: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_bias": False},
    "granite": {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 8**-0.5,
        "logits_scaling": 1.0,
    },
    "smollm3": {"no_rope_layers": [1, 1]},
}


def small_model(family: Family, seed: int = 0, **changes: Any) -> Any:
    """A model of the family in float32; every tensor is drawn, none is the ones or zeros that its class begins with."""
    fields = SIZES | OWN.get(family.name, {}) | changes
    config = family.config_class(**fields)
    model = family.causal_lm_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(parameter + 0.3 * drawn)
            elif parameter.dim() < 2:
                parameter.copy_(parameter + 0.2 * drawn)
            else:
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
    return model


def save_small_model(family: Family, folder: Path, **changes: Any) -> Path:
    small_model(family, **changes).save_pretrained(folder)
    return folder


__all__ = [
    "FAMILIES",
    "LIKE_LLAMA",
    "OWN",
    "SIZES",
    "VOCABULARY",
    "AutoModelForCausalLM",
    "save_small_model",
    "small_model",
]
