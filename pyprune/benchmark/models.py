"""The sizes of published models (tiny and llama-1.5b: ours, for tests and for a middle size with few KV heads)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"family": "llama", "hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2,
             "intermediate_size": 160, "vocab_size": 8192},
    "llama-1.5b": {"family": "llama", "hidden_size": 2048, "layers": 24, "heads": 16, "kv_heads": 4,
                   "intermediate_size": 8192, "vocab_size": 32000},
    "llama-2-7b": {"family": "llama", "hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 32,
                   "intermediate_size": 11008, "vocab_size": 32000},
    "llama-2-13b": {"family": "llama", "hidden_size": 5120, "layers": 40, "heads": 40, "kv_heads": 40,
                    "intermediate_size": 13824, "vocab_size": 32000},
    "llama-3.1-8b": {"family": "llama", "hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 8,
                     "intermediate_size": 14336, "vocab_size": 128256},
    "llama-3.3-70b": {"family": "llama", "hidden_size": 8192, "layers": 80, "heads": 64, "kv_heads": 8,
                      "intermediate_size": 28672, "vocab_size": 128256},
    "smollm2-135m": {"family": "llama", "hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3,
                     "intermediate_size": 1536, "vocab_size": 49152, "tie": True},
    "mistral-7b": {"family": "mistral", "hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 32768},
    "qwen2.5-1.5b": {"family": "qwen2", "hidden_size": 1536, "layers": 28, "heads": 12, "kv_heads": 2,
                     "intermediate_size": 8960, "vocab_size": 151936, "tie": True},
    "qwen2.5-32b": {"family": "qwen2", "hidden_size": 5120, "layers": 64, "heads": 40, "kv_heads": 8,
                    "intermediate_size": 27648, "vocab_size": 152064},
    "qwen3-0.6b": {"family": "qwen3", "hidden_size": 1024, "layers": 28, "heads": 16, "kv_heads": 8,
                   "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie": True},
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder layer. head_dim: channels of a head; group: query heads of a KV group."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def output_projs(self) -> dict[str, int]:
        """The linears whose inputs are pruned, and how many input channels each has."""
        return {"o": self.heads * self.head_dim, "down": self.intermediate}


def model_of(name: str) -> Model:
    """InputError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}; one of {', '.join(SHAPES)}")
    sizes = SHAPES[name]
    head_dim = sizes.get("head_dim") or sizes["hidden_size"] // sizes["heads"]
    return Model(name, sizes["hidden_size"], sizes["heads"], sizes["kv_heads"], head_dim, sizes["intermediate_size"])
