"""Base of the passes' costs, and the terms that they share.

Bytes are of what PyTorch holds of the device; a few hundred MB of CUDA itself come on top. They follow the passes' code
step by step; each term names its tensors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...architectures import SUBLAYERS, LayerShape
from ...methods import Method
from ..sizes import Sizes
from ..time import OVERHEAD, Rates, sublayer_seconds

MethodT = TypeVar("MethodT", bound=Method, covariant=True)


@dataclass(frozen=True)
class CpuRun:
    """A run on a CPU: windows in a micro-batch, bytes of the embeddings, and whether weights are converted."""

    batch: int
    embeddings: int
    converts: bool


@dataclass(frozen=True)
class PassCost(ABC, Generic[MethodT]):
    """One pass of a run.

    `streams`: sets of hidden states that it holds.
    """

    sizes: Sizes[MethodT]

    @property
    def streams(self) -> int:
        return 1

    @property
    def method(self) -> MethodT:
        return self.sizes.method

    def flops(self) -> float:
        """FLOPs of forwards over the text and of second moments (one triangle); 0: the pass looks at no text."""
        return 0.0

    def seconds(self, rates: Rates) -> float:
        """Seconds on a GPU over all layers, with the weights there and no wait for files."""
        return 0.0

    @abstractmethod
    def device_bytes(self, batch: int, on_device: int) -> int:
        """Peak bytes, with micro-batches of `batch` windows and `on_device` sets of hidden states on the device."""

    @abstractmethod
    def cpu_bytes(self, run: CpuRun) -> int:
        """Peak bytes on a CPU, beside the interpreter and libraries."""

    def forward_flops(self) -> float:
        return sum(forward_flops(shape, self.sizes.samples, self.sizes.sequence_length) for shape in self.sizes.shapes)

    def forward_seconds(self, rates: Rates) -> float:
        """Seconds of one layer's forward."""
        return sum(sublayer_seconds(self.sizes, sublayer, self.sizes.tokens, rates) for sublayer in SUBLAYERS)

    def moments_seconds(self, rates: Rates) -> float:
        """Seconds of one layer's channel moments."""
        return sum(2 * self.sizes.tokens * self.sizes.width(sublayer) for sublayer in SUBLAYERS) / rates.memory

    def in_all(self, seconds: float) -> float:
        """Scale one layer's seconds to the whole pass."""
        return OVERHEAD * len(self.sizes.shapes) * seconds


def forward_flops(shape: LayerShape, samples: int, sequence_length: int) -> float:
    """Multiply-adds of the linears, twice, and causal attention (half of the score matrix)."""
    tokens = samples * sequence_length
    heads = shape.heads
    return tokens * (2 * shape.parameters + 2 * heads * shape.head_dim * sequence_length)


def output_proj_widths(sizes: Sizes) -> list[int]:
    """Input channels of every output projection."""
    return [shape.units(m) * shape.unit_width(m) for shape in sizes.shapes for m in SUBLAYERS]


def hessian_flops(sizes: Sizes) -> float:
    return sum(sizes.samples * sizes.sequence_length * d**2 for d in output_proj_widths(sizes))


def pruned_layer(sizes: Sizes) -> int:
    """A layer as it is written; a whole one where some stay whole."""
    return sizes.layer() if sizes.method.spares_layers else int((1 - sizes.ratio) * sizes.layer())


def widest_ffn(sizes: Sizes) -> LayerShape:
    return max(sizes.shapes, key=lambda shape: shape.intermediate_channels)


def layer_cpu_bytes(sizes: Sizes, run: CpuRun) -> int:
    """A layer in the compute type, and as stored where that is another."""
    return sizes.shape.parameters * sizes.compute_bytes + (sizes.layer() if run.converts else 0)


def forward_cpu_bytes(sizes: Sizes, run: CpuRun) -> int:
    """Hidden states, one layer, and a micro-batch of its temporaries."""
    shape = widest_ffn(sizes)
    tokens = run.batch * sizes.sequence_length
    # Alive at once: the FFN's gate, up, activation and product, and four copies of the residual stream.
    temporaries = tokens * (4 * shape.intermediate_channels + 4 * shape.hidden_size) * sizes.compute_bytes
    return sizes.hidden(sizes.windows) + layer_cpu_bytes(sizes, run) + temporaries
