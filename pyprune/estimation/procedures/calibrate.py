"""Costs of the pass over the dense model: channel moments, or Hessians and error curves."""

from dataclasses import dataclass

from ...architectures import FFN, SUBLAYERS
from ...methods import Method, SecondOrderMethod
from ..time import CURVE_SHARE, Rates, output_proj_seconds
from .base import CpuRun, MethodT, PassCost, forward_cpu_bytes, hessian_flops
from .elimination import curve, deepest, inverting


@dataclass(frozen=True)
class CalibrationCost(PassCost[MethodT]):
    """One forward of the dense model and the moments of its output projections' inputs.

    `moments_count`: whether the moments are in the seconds.
    """

    moments_count: bool = True

    @property
    def windows(self) -> int:
        return self.sizes.windows

    def flops(self) -> float:
        return self.forward_flops()

    def seconds(self, rates: Rates) -> float:
        forward = self.forward_seconds(rates)
        return self.in_all(forward + self.moments_seconds(rates) if self.moments_count else forward)

    def sublayer_bytes(self, sublayer: str, batch: int) -> int:
        """Statistics of one output projection beside a forward."""
        return 4 * self.sizes.width(sublayer) * 8 + self.sizes.forward(sublayer, batch)

    def device_bytes(self, batch: int, on_device: int) -> int:
        layers = 2 * self.sizes.layer() + self.sizes.converted()
        standing = layers + self.sizes.placed(batch, on_device, 1, self.windows)
        return standing + max(self.sublayer_bytes(sublayer, batch) for sublayer in SUBLAYERS)

    def cpu_bytes(self, run: CpuRun) -> int:
        return forward_cpu_bytes(self.sizes, run)


@dataclass(frozen=True)
class UncountedCalibrationCost(CalibrationCost[Method]):
    """Forward of the refit, counted for memory only: its work is little beside the training of masks."""

    def flops(self) -> float:
        return 0.0


@dataclass(frozen=True)
class CurvesCost(CalibrationCost[SecondOrderMethod]):
    """One forward of the dense model over some windows, Hessians, and eliminations as far as the error curves go."""

    @property
    def windows(self) -> int:
        return min(self.sizes.windows, -(-self.method.allocation_windows // self.sizes.processes))

    def flops(self) -> float:
        share = min(1.0, self.method.allocation_windows / self.sizes.samples)  # of the windows
        return share * (self.forward_flops() + hessian_flops(self.sizes))

    def seconds(self, rates: Rates) -> float:
        few = self.windows * self.sizes.sequence_length
        seconds = self.forward_seconds(rates) * few / self.sizes.tokens
        for sublayer in SUBLAYERS:
            share = deepest(self.sizes) if sublayer == FFN else 1.0  # how far the curves go
            own = output_proj_seconds(self.sizes, sublayer, few, share, rates, CURVE_SHARE)
            seconds += own["hessian"] + own["inverse"] + own["eliminate"]
        return self.in_all(seconds)

    def sublayer_bytes(self, sublayer: str, batch: int) -> int:
        d = self.sizes.width(sublayer)
        observing = d * d * 4 + self.sizes.forward(sublayer, batch)
        return max(observing, inverting(self.sizes, sublayer), curve(self.sizes, sublayer))
