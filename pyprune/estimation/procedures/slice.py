"""Costs of slicing the units that a method scored."""

from dataclasses import dataclass

from ...architectures import SUBLAYERS
from ...checkpoint import CheckpointWriter
from ...methods import Method, ScoringMethod
from ..time import Rates
from .base import CpuRun, PassCost, forward_cpu_bytes, pruned_layer


@dataclass(frozen=True)
class SliceCost(PassCost[Method]):
    """Slices as chosen beforehand; no forward."""

    def device_bytes(self, batch: int, on_device: int) -> int:
        layers = 2 * self.sizes.layer() + self.sizes.converted()
        return layers + CheckpointWriter.MOST_IN_FLIGHT * pruned_layer(self.sizes)

    def cpu_bytes(self, run: CpuRun) -> int:
        return max(run.embeddings, self.sizes.layer() * 2)


@dataclass(frozen=True)
class SequentialSliceCost(PassCost[ScoringMethod]):
    """Layer by layer: a forward for the statistics, the slice, and a forward of what is left."""

    def flops(self) -> float:
        return self.forward_flops() * (2 - self.sizes.ratio)

    def seconds(self, rates: Rates) -> float:
        return self.in_all(self.forward_seconds(rates) * (2 - self.sizes.ratio) + self.moments_seconds(rates))

    def device_bytes(self, batch: int, on_device: int) -> int:
        layers = 2 * self.sizes.layer() + self.sizes.converted()
        standing = layers + pruned_layer(self.sizes) + self.sizes.placed(batch, on_device, 1, self.sizes.windows)
        return standing + max(self.sizes.forward(sublayer, batch) for sublayer in SUBLAYERS)

    def cpu_bytes(self, run: CpuRun) -> int:
        rewriting = self.sizes.layer() * 2 + self.sizes.hidden(self.sizes.windows)
        return max(forward_cpu_bytes(self.sizes, run), run.embeddings, rewriting)
