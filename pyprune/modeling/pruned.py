"""transformers classes of pruned models: every layer is built from its own entry of `per_layer_config`.

Checkpoints keep the tensor names of their family; `config.json` carries transformers' own schema for models whose
layers differ. `o_proj_bias` and `down_proj_bias` say that the drivers have a (compensation) bias.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
)

from ..architectures import GRANITE, LLAMA, MISTRAL, PRUNED_PREFIX, QWEN2, QWEN3, SMOLLM3, Family


class _PrunedConfig:
    def validate_architecture(self) -> None:
        """Nothing to hold: with `head_dim` written out, the hidden size need not be a multiple of the heads."""


@strict
class PyPruneLlamaConfig(_PrunedConfig, LlamaConfig):
    model_type = PRUNED_PREFIX + "llama"
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class PyPruneMistralConfig(_PrunedConfig, MistralConfig):
    model_type = PRUNED_PREFIX + "mistral"
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class PyPruneQwen2Config(_PrunedConfig, Qwen2Config):
    model_type = PRUNED_PREFIX + "qwen2"
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class PyPruneQwen3Config(_PrunedConfig, Qwen3Config):
    model_type = PRUNED_PREFIX + "qwen3"
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class PyPruneGraniteConfig(_PrunedConfig, GraniteConfig):
    model_type = PRUNED_PREFIX + "granite"
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@strict
class PyPruneSmolLM3Config(_PrunedConfig, SmolLM3Config):
    model_type = PRUNED_PREFIX + "smollm3"
    o_proj_bias: bool = False
    down_proj_bias: bool = False


@contextmanager
def _without_layers(config: Any) -> Iterator[None]:
    """Inside, the family's own constructors build no layer (they would all have the global size)."""
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = layers


class _PrunedModel:
    """The family's body with layers of each one's own size."""

    family: Family

    def __init__(self, config: Any) -> None:
        with _without_layers(config):
            super().__init__(config)  # type: ignore[call-arg]
        self.layers = nn.ModuleList(self.family.build_layer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()  # type: ignore[attr-defined]


class PyPruneLlamaModel(_PrunedModel, LlamaModel):
    config: PyPruneLlamaConfig
    family = LLAMA


class PyPruneMistralModel(_PrunedModel, MistralModel):
    config: PyPruneMistralConfig
    family = MISTRAL


class PyPruneQwen2Model(_PrunedModel, Qwen2Model):
    config: PyPruneQwen2Config
    family = QWEN2


class PyPruneQwen3Model(_PrunedModel, Qwen3Model):
    config: PyPruneQwen3Config
    family = QWEN3


class PyPruneGraniteModel(_PrunedModel, GraniteModel):
    config: PyPruneGraniteConfig
    family = GRANITE


class PyPruneSmolLM3Model(_PrunedModel, SmolLM3Model):
    config: PyPruneSmolLM3Config
    family = SMOLLM3


class _PrunedForCausalLM:
    """The family's causal language model over the pruned body."""

    body_class: type

    def __init__(self, config: Any) -> None:
        with _without_layers(config):
            super().__init__(config)  # type: ignore[call-arg]
        self.model = self.body_class(config)
        self.post_init()  # type: ignore[attr-defined]


class PyPruneLlamaForCausalLM(_PrunedForCausalLM, LlamaForCausalLM):
    config: PyPruneLlamaConfig
    body_class = PyPruneLlamaModel


class PyPruneMistralForCausalLM(_PrunedForCausalLM, MistralForCausalLM):
    config: PyPruneMistralConfig
    body_class = PyPruneMistralModel


class PyPruneQwen2ForCausalLM(_PrunedForCausalLM, Qwen2ForCausalLM):
    config: PyPruneQwen2Config
    body_class = PyPruneQwen2Model


class PyPruneQwen3ForCausalLM(_PrunedForCausalLM, Qwen3ForCausalLM):
    config: PyPruneQwen3Config
    body_class = PyPruneQwen3Model


class PyPruneGraniteForCausalLM(_PrunedForCausalLM, GraniteForCausalLM):
    config: PyPruneGraniteConfig
    body_class = PyPruneGraniteModel


class PyPruneSmolLM3ForCausalLM(_PrunedForCausalLM, SmolLM3ForCausalLM):
    config: PyPruneSmolLM3Config
    body_class = PyPruneSmolLM3Model


PRUNED_CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "llama": (PyPruneLlamaConfig, PyPruneLlamaModel, PyPruneLlamaForCausalLM),
    "mistral": (PyPruneMistralConfig, PyPruneMistralModel, PyPruneMistralForCausalLM),
    "qwen2": (PyPruneQwen2Config, PyPruneQwen2Model, PyPruneQwen2ForCausalLM),
    "qwen3": (PyPruneQwen3Config, PyPruneQwen3Model, PyPruneQwen3ForCausalLM),
    "granite": (PyPruneGraniteConfig, PyPruneGraniteModel, PyPruneGraniteForCausalLM),
    "smollm3": (PyPruneSmolLM3Config, PyPruneSmolLM3Model, PyPruneSmolLM3ForCausalLM),
}
