"""The shape of a decoder layer: how many units it has, and what each costs."""

from dataclasses import dataclass, replace

ATTENTION = "attention"
FFN = "ffn"
SUBLAYERS = (ATTENTION, FFN)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    heads_per_group: r = query heads per KV head; a KV group is one key head, one value head and its r query heads, and
    owns `heads_per_group * head_dim` contiguous input columns of the attention's output projection. A layer without
    such heads (linear attention) has `kv_groups` 0.
    ffn_matrices: 3 with a gate, 2 without. query_parts: 2 where the query projection also makes a gate of the heads'
    outputs. shared_key_value: all query heads share one key and value head, which stay; a group is then a query head,
    and r is 1.
    fixed: sublayers that lose no units. group_counts: the numbers of KV groups that the model's class takes; None: any.
    """

    hidden_size: int
    head_dim: int
    kv_groups: int
    heads_per_group: int
    intermediate_channels: int
    ffn_matrices: int = 3
    query_parts: int = 1
    shared_key_value: bool = False
    fixed: tuple[str, ...] = ()
    group_counts: tuple[int, ...] | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_groups * self.heads_per_group

    @property
    def key_value_heads(self) -> int:
        return 1 if self.shared_key_value else self.kv_groups

    @property
    def key_channels(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.key_value_heads * self.head_dim

    @property
    def group_width(self) -> int:
        """Input columns of the attention's output projection that one KV group owns."""
        return self.heads_per_group * self.head_dim

    @property
    def _group_rows(self) -> int:
        """Rows of query, key and value, and columns of the output projection, of one KV group."""
        own = 0 if self.shared_key_value else 2
        return self.head_dim * ((self.query_parts + 1) * self.heads_per_group + own)

    @property
    def group_cost(self) -> float:
        """Parameters of one KV group, in FFN channels: head_dim * (2r + 2) / 3, a fraction, never truncated."""
        return self._group_rows / self.ffn_matrices

    @property
    def cost(self) -> float:
        """All units of the layer that may go, in FFN channels."""
        return self.removable(ATTENTION) * self.group_cost + self.removable(FFN)

    @property
    def parameters(self) -> int:
        """Parameters of the layer's decoder linears that belong to units (q, k, v, o, gate, up, down; no biases)."""
        return self.hidden_size * (self.kv_groups * self._group_rows + self.ffn_matrices * self.intermediate_channels)

    @property
    def prunable_parameters(self) -> int:
        """Those of units that may go."""
        attention = self.removable(ATTENTION) * self._group_rows
        return self.hidden_size * (attention + self.ffn_matrices * self.removable(FFN))

    @property
    def input_widths(self) -> tuple[int, int, int, int]:
        """Channels of the layer's four inputs of linears: behind each norm, and of each output projection."""
        return (self.hidden_size, self.kv_groups * self.group_width, self.hidden_size, self.intermediate_channels)

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sublayers that have units."""
        return tuple(sublayer for sublayer in SUBLAYERS if self.units(sublayer))

    def units(self, sublayer: str) -> int:
        return self.kv_groups if sublayer == ATTENTION else self.intermediate_channels

    def removable(self, sublayer: str) -> int:
        """Units of the sublayer, 0 where none of them may go."""
        return 0 if sublayer in self.fixed else self.units(sublayer)

    def unit_width(self, sublayer: str) -> int:
        """Input columns of the sublayer's output projection that one unit owns."""
        return self.group_width if sublayer == ATTENTION else 1

    def unit_cost(self, sublayer: str) -> float:
        """Parameters of one unit of the sublayer, in FFN channels (ffn_matrices * hidden_size parameters each)."""
        return self.group_cost if sublayer == ATTENTION else 1.0

    def least_cost(self, channels: int) -> float:
        """What stays at least of the units that may go: one KV group and `channels` FFN channels, in FFN channels."""
        return min(self.removable(ATTENTION), 1) * self.group_cost + min(self.removable(FFN), channels)

    def kept(self, kv_groups: int, intermediate_channels: int) -> "LayerShape":
        return replace(self, kv_groups=kv_groups, intermediate_channels=intermediate_channels)

    def fixing(self, *sublayers: str) -> "LayerShape":
        """The shape whose `sublayers` lose no units, and those that lose none already."""
        return replace(self, fixed=tuple(m for m in SUBLAYERS if m in (*self.fixed, *sublayers)))
