"""A pruned Llama model, whose layers differ in their numbers of attention heads and FFN channels.

Needs transformers 5.17 or later and nothing else. `per_layer_config` in config.json has each layer's own sizes;
`o_proj_bias` and `down_proj_bias` say that these matrices have a bias. Load it with trust_remote_code=True.
"""

# `pyprune export --format remote-code` writes this file beside the checkpoint, with the family's name for Llama's.

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


@strict
class PrunedLlamaConfig(LlamaConfig):
    model_type = "pyprune_llama"
    o_proj_bias: bool = False
    down_proj_bias: bool = False

    def validate_architecture(self) -> None:
        """Accept any sizes: with `head_dim` written out, the hidden size need not be a multiple of the heads."""


def build_layer(config: Any, layer: int) -> nn.Module:
    """Decoder layer `layer` with its own sizes and biases."""
    block = LlamaDecoderLayer(config.per_layer_config[layer], layer)
    if config.o_proj_bias:
        block.self_attn.o_proj = with_bias(block.self_attn.o_proj)
    if config.down_proj_bias:
        block.mlp.down_proj = with_bias(block.mlp.down_proj)
    # The attention reads its implementation (sdpa, eager) from the config that `set_attn_implementation` changes.
    block.self_attn.config = config
    return block


def with_bias(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight
    return nn.Linear(linear.in_features, linear.out_features, bias=True, device=weight.device, dtype=weight.dtype)


@contextmanager
def without_layers(config: Any) -> Iterator[None]:
    """Keep transformers' constructors from building layers, which would all have the same sizes."""
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = layers


class PrunedLlamaModel(LlamaModel):
    config_class = PrunedLlamaConfig

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(build_layer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.model = PrunedLlamaModel(config)
        self.post_init()
