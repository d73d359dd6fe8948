"""What a family declares of its layers: names of matrices and norms, how they are wired, what is scaled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .shape import ATTENTION, FFN, LayerShape

Rows = dict[str, tuple[int, ...]]  # matrix -> rows that a unit owns in each of its blocks, one block after another

# Kinds of layers. A linear one has no heads that could go.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# Kinds of norms: w · x / rms(x); (1 + w) · x / rms(x), multiplied in float32; x less its mean, with or without a bias.
RMS, RMS_PLUS_ONE, LAYER = "rms", "rms + 1", "layer"
# Which channels of a head, or of its first part, rotary embeddings turn together: those of its two halves, as Llama;
# neighbours, by the angles of the first half, as GLM; otherwise; or there are none.
HALVES, NEIGHBOURS, OTHER_ROTARY, NO_ROTARY = "halves", "neighbours", "other", "none"
# Norms of queries and keys whose weights heads share, or of which each head has its own, or over all heads at once.
SHARED, OWN, WHOLE = "shared", "own", "whole"


@dataclass(frozen=True)
class Attention:
    """Names of the attention's matrices within a layer.

    fused: one matrix with the rows of query, key and value, in this order; `interleaved`: query, key and value of each
    head together. head_norms: SHARED, OWN or WHOLE, None without; `norms` names them where heads own them. gated: the
    query projection also makes a gate of the heads' outputs. reads_sizes: the numbers of heads are read from its
    configuration in every forward. linear: the matrices that read the norm in layers of linear attention.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: str | None = None
    interleaved: bool = False
    head_norms: str | None = None
    norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    gated: bool = False
    reads_sizes: bool = False
    linear: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The matrices that read the stream."""
        return (self.fused,) if self.fused else (self.query, self.key, self.value)

    @property
    def keeps_heads(self) -> bool:
        """Whether every head stays: with fewer of them the others would compute something else."""
        return self.head_norms == WHOLE

    def rows(self, shape: LayerShape) -> Rows:
        """Rows of what reads the stream, and of norms of heads' own, that a unit owns."""
        query, own = shape.group_width * shape.query_parts, shape.head_dim
        if self.interleaved:
            rows: Rows = {self.inputs[0]: (query + 2 * own,)}
        elif self.fused:
            rows = {self.fused: (query, own, own)}
        elif shape.shared_key_value:
            rows = {self.query: (query,)}
        else:
            rows = {self.query: (query,), self.key: (own,), self.value: (own,)}
        if self.head_norms == OWN:
            rows |= {self.norms[0]: (shape.heads_per_group,)}
            rows |= {} if shape.shared_key_value else {self.norms[1]: (1,)}
        return rows


@dataclass(frozen=True)
class Gated:
    """An FFN down(f(gate(x)) * up(x)); fused: one matrix with the rows of gate and up, in this order."""

    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    output: str = "mlp.down_proj"
    fused: str | None = None
    matrices = 3

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.fused,) if self.fused else (self.gate, self.up)

    def rows(self) -> Rows:
        return {self.fused: (1, 1)} if self.fused else dict.fromkeys(self.inputs, (1,))


@dataclass(frozen=True)
class Plain:
    """An FFN down(f(up(x)))."""

    up: str = "mlp.up_proj"
    output: str = "mlp.down_proj"
    matrices = 2

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.up,)

    def rows(self) -> Rows:
        return {self.up: (1,)}


@dataclass(frozen=True)
class Wiring:
    """How attention and FFN read the residual stream and add to it.

    before: the norms whose outputs they read, () if they read the stream itself. after: norms of what they put out.
    parallel: the FFN reads what the attention reads, and both are added at once.
    """

    before: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, ...] = ()
    parallel: bool = False

    @property
    def shares_norm(self) -> bool:
        """Whether attention and FFN read the same norm's output."""
        return self.parallel and len(set(self.before)) == 1

    def norm_before(self, sublayer: str) -> str | None:
        return dict(zip((ATTENTION, FFN), self.before, strict=True))[sublayer] if self.before else None

    def norm_after(self, sublayer: str) -> str | None:
        return dict(zip((ATTENTION, FFN), self.after, strict=True))[sublayer] if self.after else None


@dataclass(frozen=True)
class Scales:
    """What is multiplied in outside of matrices and norms.

    embed: hidden states before the first layer from the embeddings' rows. residual: factor of what a sublayer adds to
    the stream. logits: the logits from those of the head.
    """

    embed: Callable[[Any, Tensor], Tensor] = lambda config, rows: rows
    residual: Callable[[Any], float] = lambda config: 1.0
    logits: Callable[[Any, Tensor], Tensor] = lambda config, logits: logits


def by_layer_type(config: Any, layer: int) -> str:
    """The kind of a layer whose family lists them in `layer_types`."""
    return str(config.layer_types[layer])
