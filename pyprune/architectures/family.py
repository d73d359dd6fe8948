"""A model family: the names of its projections and norms, and the shape of a layer."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "attention"
FFN = "ffn"
SUBLAYERS = (ATTENTION, FFN)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    `heads_per_group` is r = query heads per KV head; a KV group is one key head, one value head and its r query
    heads, and owns `heads_per_group * head_dim` contiguous input columns of `o_proj`.
    """

    hidden_size: int
    head_dim: int
    kv_groups: int
    heads_per_group: int
    intermediate_channels: int

    @property
    def group_width(self) -> int:
        """Input columns of `o_proj` that one KV group owns."""
        return self.heads_per_group * self.head_dim

    @property
    def group_cost(self) -> float:
        """Parameters of one KV group, in FFN channels: head_dim * (2r + 2) / 3, a fraction, never truncated."""
        return self.head_dim * (2 * self.heads_per_group + 2) / 3

    @property
    def cost(self) -> float:
        """All units of the layer, in FFN channels."""
        return self.kv_groups * self.group_cost + self.intermediate_channels

    @property
    def parameters(self) -> int:
        """Parameters of the layer's decoder linears (q, k, v, o, gate, up, down; no biases)."""
        attention = self.kv_groups * self.head_dim * (2 * self.heads_per_group + 2)
        return self.hidden_size * (attention + 3 * self.intermediate_channels)

    @property
    def input_widths(self) -> tuple[int, int, int, int]:
        """Channels of the layer's four inputs of linears: behind each norm, and of each output projection."""
        return (self.hidden_size, self.kv_groups * self.group_width, self.hidden_size, self.intermediate_channels)

    def units(self, sublayer: str) -> int:
        return self.kv_groups if sublayer == ATTENTION else self.intermediate_channels

    def unit_width(self, sublayer: str) -> int:
        """Input columns of the sublayer's output projection that one unit owns."""
        return self.group_width if sublayer == ATTENTION else 1

    def unit_cost(self, sublayer: str) -> float:
        """Parameters of one unit of the sublayer, in FFN channels (3 * hidden_size parameters each)."""
        return self.group_cost if sublayer == ATTENTION else 1.0

    def kept(self, kv_groups: int, intermediate_channels: int) -> "LayerShape":
        return LayerShape(self.hidden_size, self.head_dim, kv_groups, self.heads_per_group, intermediate_channels)


@dataclass(frozen=True)
class Family:
    """One model family of transformers. The names below are those of Llama; a family overrides what differs.

    `name` is transformers' `model_type`, `prefix` begins the names of its classes; `sliding` says by layer whether
    a layer's attention sees a sliding window only, and `check` raises InputError for a configuration with anything that
    the layer-by-layer forward leaves out.
    """

    name: str
    prefix: str
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    output_projs: tuple[tuple[str, str], ...] = ((ATTENTION, "self_attn.o_proj"), (FFN, "mlp.down_proj"))
    norms: tuple[tuple[str, str], ...] = ((ATTENTION, "input_layernorm"), (FFN, "post_attention_layernorm"))
    query: str = "self_attn.q_proj"
    key_value: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    sliding: Callable[[Any, int], bool] = lambda config, layer: False
    check: Callable[[Any], None] = lambda config: None

    def output_proj(self, sublayer: str) -> str:
        """Name within a layer of the sublayer's output projection, the matrix whose input columns are pruned."""
        return dict(self.output_projs)[sublayer]

    def norm(self, sublayer: str) -> str:
        """Name within a layer of the norm whose output the sublayer reads."""
        return dict(self.norms)[sublayer]

    def input_projs(self, sublayer: str) -> tuple[str, ...]:
        """Names within a layer of the input projections, whose rows go with the output projection's columns."""
        return (self.query, *self.key_value) if sublayer == ATTENTION else self.gate_up

    def source(self, kind: str = "modeling") -> Any:
        """transformers' sublayer of the family's classes."""
        return importlib.import_module(f"transformers.models.{self.name}.{kind}_{self.name}")

    def _class(self, suffix: str, kind: str = "modeling") -> Any:
        return getattr(self.source(kind), self.prefix + suffix)

    @property
    def config_class(self) -> Any:
        return self._class("Config", "configuration")

    @property
    def layer_class(self) -> Any:
        return self._class("DecoderLayer")

    @property
    def rotary_class(self) -> Any:
        return self._class("RotaryEmbedding")

    @property
    def norm_class(self) -> Any:
        return self._class("RMSNorm")

    @property
    def model_class(self) -> Any:
        return self._class("Model")

    @property
    def causal_lm_class(self) -> Any:
        return self._class("ForCausalLM")

    def layer_shape(self, config: Any, layer: int) -> LayerShape:
        own = config.per_layer_config[layer]
        heads, groups = own.num_attention_heads, own.num_key_value_heads
        head_dim = getattr(own, "head_dim", None) or own.hidden_size // heads
        return LayerShape(own.hidden_size, head_dim, groups, heads // groups, own.intermediate_size)

    def shapes(self, config: Any) -> list[LayerShape]:
        return [self.layer_shape(config, layer) for layer in range(config.num_hidden_layers)]

    def build_layer(self, config: Any, layer: int) -> nn.Module:
        """Build decoder layer `layer` of transformers' class with the layer's sizes and compensation biases.

        Build it under `torch.device("meta")` to allocate nothing. `config.o_proj_bias` and `config.down_proj_bias`
        (absent in a stock configuration) put a bias on the output projections of a family that has none there.
        """
        block = self.layer_class(config.per_layer_config[layer], layer)
        for sublayer, flag in ((ATTENTION, "o_proj_bias"), (FFN, "down_proj_bias")):
            if getattr(config, flag, False):
                parent, name = self.output_proj(sublayer).split(".")
                linear = getattr(getattr(block, parent), name)
                if linear.bias is None:
                    biased = nn.Linear(
                        linear.in_features,
                        linear.out_features,
                        bias=True,
                        device=linear.weight.device,
                        dtype=linear.weight.dtype,
                    )
                    setattr(getattr(block, parent), name, biased)
        # The attention reads its implementation (sdpa, eager) from its config: it must be the one that
        # `set_attn_implementation` changes, not this layer's copy.
        block.self_attn.config = config
        return block

    def layer_state_shapes(self, config: Any, layer: int) -> dict[str, tuple[int, ...]]:
        """Names (within the layer) and shapes of the tensors that a checkpoint must hold for a layer."""
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in self.build_layer(config, layer).state_dict().items()}

    def unit_slices(self, shape: LayerShape, sublayer: str, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Map the names of matrices to the slices of the kept units: (dimension, indices).

        Dimension 1 is the output projection's input; dimension 0 the output rows of the input projections (and of its
        bias).
        """
        if sublayer == FFN:
            slices = dict.fromkeys(self.gate_up, (0, kept))
        else:
            slices = {self.query: (0, expand(kept, shape.group_width))}
            slices |= dict.fromkeys(self.key_value, (0, expand(kept, shape.head_dim)))
        slices[self.output_proj(sublayer)] = (1, expand(kept, shape.unit_width(sublayer)))
        return slices


def expand(units: Tensor, width: int) -> Tensor:
    """Indices of the channels of `units` when each owns `width` contiguous ones: [n] -> [n * width]."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)
