"""Sizes of a run: what its passes' work, seconds and memory are computed from."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from ..architectures import ATTENTION, FFN, LayerShape
from ..methods import Method

MethodT = TypeVar("MethodT", bound=Method, covariant=True)


@dataclass(frozen=True)
class Sizes(Generic[MethodT]):
    """Sizes that the work and memory of a run depend on; tokens of all windows are split over `processes`.

    compute_bytes, stored_bytes: of one weight in the compute type and as stored.
    """

    shapes: list[LayerShape]
    method: MethodT
    ratio: float
    samples: int
    sequence_length: int
    compute_bytes: int
    stored_bytes: int
    processes: int = 1

    @property
    def windows(self) -> int:
        return -(-self.samples // self.processes)

    @property
    def shape(self) -> LayerShape:
        return max(self.shapes, key=lambda shape: shape.parameters)

    @property
    def tokens(self) -> int:
        """Tokens of one process."""
        return self.windows * self.sequence_length

    def hidden(self, windows: int) -> int:
        return windows * self.sequence_length * self.shape.hidden_size * self.compute_bytes

    def width(self, sublayer: str) -> int:
        return self.shape.units(sublayer) * self.shape.unit_width(sublayer)

    def matrices(self, sublayer: str) -> int:
        """Bytes of a sublayer's matrices that read the residual stream, in the compute type."""
        shape = self.shape
        if sublayer == FFN:
            return 2 * shape.hidden_size * shape.intermediate_channels * self.compute_bytes
        groups = shape.kv_groups * (shape.heads_per_group + 2) * shape.head_dim
        return shape.hidden_size * groups * self.compute_bytes

    def layer(self) -> int:
        return self.shape.parameters * self.stored_bytes

    def converted(self) -> int:
        """A layer in the compute type, where that is not the stored one."""
        return 0 if self.compute_bytes == self.stored_bytes else self.shape.parameters * self.compute_bytes

    def forward(self, sublayer: str, batch: int) -> int:
        """Temporaries of one half of a layer over a micro-batch: what is alive at once at its widest."""
        tokens, shape = batch * self.sequence_length, self.shape
        rows = tokens * shape.hidden_size
        # By transformers' steps; where pyprune's kernels run (fused.py), norms, rotations and activations need less.
        norm = rows * (4 + 4 + self.compute_bytes)  # float32 copy, its square or product, result
        if sublayer == FFN:  # the normed input; gate, its activation and up, or those and their product; output, sum
            wide = rows + 3 * tokens * shape.intermediate_channels
        else:  # normed input, q, k, v, both rotated, the attention's output
            wide = rows + 3 * tokens * self.width(ATTENTION) + 4 * tokens * shape.kv_groups * shape.head_dim
        return max(norm, (wide + rows) * self.compute_bytes)

    def placed(self, batch: int, on_device: int, streams: int, windows: int) -> int:
        """Hidden states on the device; for each set in the host two buffers and a result on its way."""
        inside = min(on_device, streams)
        return inside * self.hidden(windows) + (streams - inside) * 3 * self.hidden(batch)

    def stream_error(self, sublayer: str, batch: int) -> int:
        """Σ r xᵀ and the product added to it, and both results with their difference."""
        rows = batch * self.sequence_length * self.shape.hidden_size
        return 2 * self.shape.hidden_size * self.width(sublayer) * 4 + rows * 3 * self.compute_bytes
