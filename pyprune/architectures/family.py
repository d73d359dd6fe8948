"""A model family: what its layers are made of, and what follows from that for pruning."""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .declaration import FULL, HALVES, LINEAR, RMS, SHARED, SLIDING, Attention, Gated, Plain, Rows, Scales, Wiring
from .shape import ATTENTION, FFN, SUBLAYERS, LayerShape

# The flags of a configuration that say that the output projections have a (compensation) bias.
BIAS_FLAGS = {ATTENTION: "o_proj_bias", FFN: "down_proj_bias"}


@contextmanager
def without_layers(config: Any) -> Iterator[None]:
    """Keep the family's constructors from building layers, which would all have the global size."""
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = layers


class LayerConfig:
    """A layer's configuration whose attention implementation is that of the whole model."""

    def __init__(self, own: Any, whole: Any) -> None:
        self.own, self.whole = own, whole

    def __getattr__(self, name: str) -> Any:
        if name in ("own", "whole"):  # before they are there, as while it is copied
            raise AttributeError(name)
        return getattr(self.whole if name.startswith("_attn_implementation") else self.own, name)


@dataclass(frozen=True)
class Family:
    """One model family of transformers. The defaults are Llama's; a family declares what differs.

    name: transformers' `model_type`. prefix: begins the names of its classes. module: of transformers.models, `name`
    unless given. classes: the ends of class names that are not Llama's, by Llama's.
    layers, embeddings, final_norm, head: names of the list of layers and of tensors outside it.
    kind: FULL, SLIDING or LINEAR by layer. rotary_by_kind: each kind has rotary embeddings of its own. position_axes:
    positions of a token that they are made of, 3 where images have rows and columns; a text's are all the same.
    attention_backend: of transformers, that the layer-by-layer forward takes.
    parallel_wiring: the wiring where the configuration has `use_parallel_residual`. positions: the table of learned
    positions and the row of the first token.
    sizes: the configuration's names of query heads, KV heads (None: as many as query heads) and FFN channels.
    heads_in_stock: whether the class takes the width of a head from the configuration; else it is hidden_size / heads,
    and fewer heads need pyprune's own class.
    ffn_forward: the FFN where it is no module of its own, from the layer and the input. check: raises InputError for
    a configuration with anything that the layer-by-layer forward leaves out. computes_llama: whether a configuration
    has nothing, such as factors, that another family with Llama's layers has not. gguf: architectures of llama.cpp that
    may hold it. remote_code, vllm: whether those outputs are written.
    """

    name: str
    prefix: str
    module: str = ""
    classes: dict[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    attention: Attention = Attention()
    ffn: Gated | Plain = Gated()
    wiring: Wiring = Wiring()
    parallel_wiring: Wiring | None = None
    norm: str = RMS
    scales: Scales = Scales()
    rotary: str = HALVES
    rotary_by_kind: bool = False
    position_axes: int = 1
    kind: Callable[[Any, int], str] = lambda config, layer: FULL
    positions: tuple[str, int] | None = None
    attention_backend: str = "sdpa"
    sizes: tuple[str, str | None, str] = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    heads_in_stock: bool = True
    ffn_forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    check: Callable[[Any], None] = lambda config: None
    computes_llama: Callable[[Any], bool] = lambda config: True
    gguf: tuple[str, ...] = ()
    remote_code: bool = False
    vllm: bool = False

    def output_proj(self, sublayer: str) -> str:
        """Name within a layer of the sublayer's output projection, the matrix whose input columns are pruned."""
        return self.attention.output if sublayer == ATTENTION else self.ffn.output

    def wirings(self) -> list[Wiring]:
        """All wirings that configurations of the family may ask for."""
        return [self.wiring] if self.parallel_wiring is None else [self.wiring, self.parallel_wiring]

    def wiring_of(self, config: Any) -> Wiring:
        """The wiring of the layers of a model with this configuration."""
        if self.parallel_wiring is not None and config.use_parallel_residual:
            return self.parallel_wiring
        return self.wiring

    def input_projs(self, sublayer: str) -> tuple[str, ...]:
        """Names within a layer of the input projections, whose rows go with the output projection's columns."""
        return self.attention.inputs if sublayer == ATTENTION else self.ffn.inputs

    def sliding(self, config: Any, layer: int) -> bool:
        """Whether a layer's attention sees a sliding window only."""
        return self.kind(config, layer) == SLIDING

    @property
    def like_llama(self) -> bool:
        """Whether its layers are declared as Llama's but for biases and norms of heads."""
        plain = (self.attention.inputs, self.ffn, self.wirings(), self.norm, self.rotary, self.rotary_by_kind)
        llama = (Attention().inputs, Gated(), [Wiring()], RMS, HALVES, False)
        return plain == llama and self.attention.head_norms in (None, SHARED) and not self.attention.gated

    @property
    def selects_channels(self) -> bool:
        """Whether selections of the residual stream (DISP-LLM) are defined for its layers."""
        return self.like_llama

    def source(self, kind: str = "modeling") -> Any:
        """transformers' module of the family's classes."""
        module = self.module or self.name
        return importlib.import_module(f"transformers.models.{module}.{kind}_{module}")

    def class_name(self, suffix: str) -> str:
        return self.prefix + self.classes.get(suffix, suffix)

    def _class(self, suffix: str, kind: str = "modeling") -> Any:
        return getattr(self.source(kind), self.class_name(suffix))

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
        of_heads, of_groups, of_channels = self.sizes
        heads, channels = getattr(own, of_heads), getattr(own, of_channels)
        groups = heads if of_groups is None else getattr(own, of_groups)
        # Only where all layers have one: of KV groups that went layer by layer, one may be left in some. In a fused
        # matrix the one group stays.
        shared = (
            of_groups is not None and whole_value(config, of_groups) == 1 and heads > 1 and not self.attention.fused
        )
        linear = self.kind(config, layer) == LINEAR
        return LayerShape(
            own.hidden_size,
            self._head_dim(own, heads),
            kv_groups=0 if linear else heads if shared else groups,
            heads_per_group=1 if shared else heads // groups,
            intermediate_channels=channels,
            ffn_matrices=self.ffn.matrices,
            query_parts=2 if self.attention.gated else 1,
            shared_key_value=shared,
            fixed=(ATTENTION,) if self.attention.keeps_heads else (),
        )

    def _head_dim(self, own: Any, heads: int) -> int:
        """Channels of a head. A stock class without `heads_in_stock` reads none, whatever its configuration has."""
        reads = self.heads_in_stock or own.model_type != self.name
        return (getattr(own, "head_dim", None) if reads else None) or own.hidden_size // heads

    def shapes(self, config: Any) -> list[LayerShape]:
        return [self.layer_shape(config, layer) for layer in range(config.num_hidden_layers)]

    def layer_sizes(self, shape: LayerShape) -> dict[str, int]:
        """The sizes of a layer under the configuration's names."""
        of_heads, of_groups, of_channels = self.sizes
        sizes = {of_channels: shape.intermediate_channels}
        if shape.kv_groups:  # else its heads, if any, are no units
            sizes = {of_heads: shape.heads} | sizes
            sizes |= {of_groups: shape.key_value_heads} if of_groups else {}
        return sizes

    def build_layer(self, config: Any, layer: int, head_dim: int | None = None) -> nn.Module:
        """Build decoder layer `layer` of transformers' class with the layer's sizes and compensation biases.

        Build it under `torch.device("meta")` to allocate nothing. `config.o_proj_bias` and `config.down_proj_bias`
        (absent in a stock configuration) put a bias on the output projections of a family that has none there.
        head_dim: of a stock configuration with fewer heads than its class can have.
        """
        block = self._stock_layer(config.per_layer_config[layer], layer, head_dim)
        for sublayer, flag in BIAS_FLAGS.items():
            if getattr(config, flag, False) and self.has(block, sublayer):
                linear: Any = block.get_submodule(self.output_proj(sublayer))
                if linear.bias is None:
                    replace_linear(block, self.output_proj(sublayer), linear.in_features, linear.out_features, True)
        # The attention reads its implementation (sdpa, eager) from its config: it must be the one that
        # `set_attn_implementation` changes, not this layer's copy.
        if self.has(block, ATTENTION):
            own = config.per_layer_config[layer]
            self.attention_of(block).config = LayerConfig(own, config) if self.attention.reads_sizes else config
        return block

    def _stock_layer(self, own: Any, layer: int, head_dim: int | None) -> nn.Module:
        """The layer by transformers' class; with fewer heads than that can have, the dense one with its heads cut."""
        made: Any = self.layer_class
        if self.heads_in_stock:
            block: nn.Module = made(own, layer)
            return block
        of_heads, of_groups, _ = self.sizes
        heads = getattr(own, of_heads)
        groups = getattr(own, of_groups) if of_groups else heads
        width = head_dim or self._head_dim(own, heads)
        dense = copy.copy(own)
        setattr(dense, of_heads, own.hidden_size // width)
        if of_groups:
            setattr(dense, of_groups, own.hidden_size // width * groups // heads)
        block = made(dense, layer)
        if heads * width != own.hidden_size:
            cut_heads(self, block, own, heads, groups, width)
        return block

    def has(self, block: nn.Module, sublayer: str) -> bool:
        """Whether a layer has the sublayer's output projection."""
        owner, _, _ = self.output_proj(sublayer).rpartition(".")
        return not owner or hasattr(block, owner.partition(".")[0])

    def attention_of(self, block: nn.Module) -> Any:
        """The module of a layer's attention, or of what the layer has in its place."""
        owner = self.attention.output.rpartition(".")[0]
        return block.get_submodule(owner if hasattr(block, owner) else self.attention.linear[0].rpartition(".")[0])

    def run_ffn(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What the layer's FFN puts out, of normed hidden states."""
        if self.ffn_forward is not None:
            return self.ffn_forward(block, hidden)
        result: Tensor = block.get_submodule(self.ffn.output.rpartition(".")[0])(hidden)
        return result

    def layer_state_shapes(self, config: Any, layer: int) -> dict[str, tuple[int, ...]]:
        """Names (within the layer) and shapes of the tensors that a checkpoint must hold for a layer."""
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in self.build_layer(config, layer).state_dict().items()}

    @property
    def body(self) -> str:
        """Name of the body within the causal language model."""
        return self.layers.partition(".")[0]

    def put_layers(self, body: nn.Module, layers: nn.ModuleList) -> None:
        """Make `layers` the body's."""
        parent, _, name = self.layers.partition(".")[2].rpartition(".")
        setattr(body.get_submodule(parent), name, layers)

    def build_outside(self, config: Any) -> nn.Module:
        """The causal language model without layers and without memory for its weights."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]), without_layers(config):
            model: nn.Module = self.causal_lm_class(config)
        return model

    def outside_shapes(self, outside: nn.Module) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors outside the layers: embeddings first, the head, tied or not, last.

        outside: what `build_outside` made.
        """
        shapes = {name: tuple(t.shape) for name, t in outside.state_dict().items()}
        ends = (self.embeddings, self.head)
        between = {name: shape for name, shape in shapes.items() if name not in ends}
        return {self.embeddings: shapes[self.embeddings]} | between | {self.head: shapes[self.head]}

    def build_final_norm(self, config: Any, tensors: dict[str, Tensor]) -> nn.Module:
        """The norm before the head with its tensors, by full name."""
        path = self.final_norm.rpartition(".")[0]
        norm = self.build_outside(config).get_submodule(path)
        norm.load_state_dict({name: tensors[f"{path}.{name}"] for name in norm.state_dict()}, assign=True)
        return norm

    def unit_rows(self, shape: LayerShape, sublayer: str) -> Rows:
        """Rows that a unit owns of the matrices, and norms, whose rows go with the output projection's columns."""
        return self.attention.rows(shape) if sublayer == ATTENTION else self.ffn.rows()

    def unit_slices(self, shape: LayerShape, sublayer: str, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Map the names of matrices to the slices of the kept units: (dimension, indices).

        Dimension 1 is the output projection's input; dimension 0 the output rows of the input projections (and of its
        bias), and of norms that heads own.
        """
        slices = {}
        for name, widths in self.unit_rows(shape, sublayer).items():
            starts = [sum(widths[:k]) * shape.units(sublayer) for k in range(len(widths))]
            blocks = [start + expand(kept, width) for start, width in zip(starts, widths, strict=True)]
            slices[name] = (0, torch.cat(blocks))
        slices[self.output_proj(sublayer)] = (1, expand(kept, shape.unit_width(sublayer)))
        return slices


def whole_value(config: Any, name: str) -> Any:
    """A field of the whole model's configuration, the largest where layers differ, without transformers' warning."""
    return object.__getattribute__(config, name)


def cut_heads(family: Family, block: nn.Module, own: Any, heads: int, groups: int, head_dim: int) -> None:
    """Leave `heads` query heads and `groups` KV heads in the layer's attention: new linears, its own numbers.

    own: the layer's configuration.
    """
    attention = family.attention_of(block)
    numbers = {"num_heads": heads, "num_key_value_heads": groups, "num_key_value_groups": heads // groups}
    for name, number in numbers.items():
        if hasattr(attention, name):
            setattr(attention, name, number)
    shape = LayerShape(own.hidden_size, head_dim, groups, heads // groups, intermediate_channels=1)
    sizes = {name: (own.hidden_size, sum(rows) * groups) for name, rows in family.attention.rows(shape).items()}
    sizes[family.attention.output] = (heads * head_dim, own.hidden_size)
    for name, (inputs, outputs) in sizes.items():
        replace_linear(block, name, inputs, outputs, block.get_submodule(name).bias is not None)


def replace_linear(block: nn.Module, name: str, inputs: int, outputs: int, bias: bool) -> None:
    """Put a linear of these sizes in the place of another, in its type and on its device."""
    parent, _, own = name.rpartition(".")
    weight = block.get_parameter(name + ".weight")
    linear = nn.Linear(inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype)
    setattr(block.get_submodule(parent), own, linear)


def expand(units: Tensor, width: int) -> Tensor:
    """Indices of the channels of `units` when each owns `width` contiguous ones: [n] -> [n * width]."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)


__all__ = ["ATTENTION", "BIAS_FLAGS", "FFN", "SUBLAYERS", "Family", "LayerShape", "expand", "without_layers"]
