"""The checkpoints over which the model tests run: every family, with what makes each of them different."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-mha": {"family": "llama", "heads": 4, "kv_heads": 4},
    "llama-gqa-tied": {"family": "llama", "heads": 8, "kv_heads": 2, "tie": True},
    "mistral-head-dim": {"family": "mistral", "heads": 4, "kv_heads": 2, "head_dim": 24},
    "mistral-sliding": {"family": "mistral", "heads": 4, "kv_heads": 2},
    "qwen2-biases": {"family": "qwen2", "heads": 6, "kv_heads": 3, "head_dim": 16},
    "qwen2-sliding": {"family": "qwen2", "heads": 4, "kv_heads": 2, "tie": True},
    "qwen3-qk-norm": {"family": "qwen3", "heads": 4, "kv_heads": 2, "head_dim": 32},
    "llama-biases": {"family": "llama", "heads": 4, "kv_heads": 2},
    "llama-3-rope": {"family": "llama", "heads": 4, "kv_heads": 2},
}

# What the families' checkpoints say in config.json besides their sizes.
CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral-sliding": {"sliding_window": 6},
    "qwen2-sliding": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "layer_types": None,
    },
    "llama-3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def family_checkpoint(name: str, tiny_checkpoint: Callable[..., Path], folder: Path) -> Path:
    """A random checkpoint of one of FAMILIES: float32, three layers, in shards where the name has an even length."""
    made = tiny_checkpoint(dtype="float32", shard_layers=len(name) % 2, vocab_size=97, **FAMILIES[name])
    if name not in CONFIG_CHANGES:
        return made
    target = folder / name
    target.mkdir()
    for file in made.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if name == "llama-biases":
        add_biases(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text()) | CONFIG_CHANGES[name]
    (target / "config.json").write_text(json.dumps(config))
    return target


def add_biases(file: Path) -> None:
    """A bias for every linear of every layer."""
    tensors, generator = load_file(file), torch.Generator().manual_seed(2)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows = tensors[name].shape[0]
        tensors[name.removesuffix("weight") + "bias"] = torch.randn(rows, generator=generator) * 0.1
    save_file(tensors, file, metadata={"format": "pt"})
