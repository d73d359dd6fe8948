"""Cost of setting single weights to zero, layer by layer."""

from dataclasses import dataclass

from ...architectures import SUBLAYERS, LayerShape
from ...methods import SemiStructuredMethod
from ..time import Rates, sparsifying_seconds
from .base import CpuRun, PassCost, forward_cpu_bytes, widest_ffn


@dataclass(frozen=True)
class SparsifyCost(PassCost[SemiStructuredMethod]):
    """Layer by layer: statistics of all four inputs, zeros in all linears, and a forward of the result."""

    def flops(self) -> float:
        sizes = self.sizes
        flops = self.forward_flops() * 2
        if self.method.from_hessian:
            flops += sum(sizes.samples * sizes.sequence_length * d**2 for s in sizes.shapes for d in s.input_widths)
        return flops

    def seconds(self, rates: Rates) -> float:
        from_hessian = self.method.from_hessian
        choosing = sparsifying_seconds(self.sizes, self.sizes.tokens, rates) if from_hessian else None
        found = self.moments_seconds(rates) if choosing is None else choosing
        return self.in_all(2 * self.forward_seconds(rates) + found)

    def device_bytes(self, batch: int, on_device: int) -> int:
        sizes, from_hessian = self.sizes, self.method.from_hessian
        layers = 2 * sizes.layer() + sizes.converted()
        # The layer as stored, sparse, and converted for a forward beside what is on its way to the disk.
        standing = layers + 2 * sizes.layer() + sizes.placed(batch, on_device, 1, sizes.windows)
        statistics = sum(d * d for d in sizes.shape.input_widths) * 4 if from_hessian else 0
        forwards = max(sizes.forward(sublayer, batch) for sublayer in SUBLAYERS)
        return standing + max(statistics + forwards, sparsifying(sizes.shape, from_hessian))

    def cpu_bytes(self, run: CpuRun) -> int:
        widest = widest_ffn(self.sizes)
        return forward_cpu_bytes(self.sizes, run) + sparsifying(widest, self.method.from_hessian)


def sparsifying(shape: LayerShape, from_hessian: bool) -> int:
    """Statistics of a layer's four inputs, and the zeros of its largest stack of linears on one input.

    From Hessians: all of them, one's factor and the sweep's panels, the stacked weights in float32 and their products
    with the Hessian; else |W|, scores and their order (int64).
    """
    widths = shape.input_widths
    widest = max(widths)
    stacked = max(2 * shape.intermediate_channels, 3 * shape.hidden_size) * shape.hidden_size
    stacked = max(stacked, shape.hidden_size * widest)
    if not from_hessian:
        return stacked // 2 * (4 + 4 + 8 + 8 + 1)
    return (sum(d * d for d in widths) + widest * widest + 6 * 256 * widest + 3 * stacked) * 4
