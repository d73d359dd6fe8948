"""Cost of choosing units and refitting weights by second moments, layer by layer."""

from dataclasses import dataclass

from ...architectures import ATTENTION, FFN, SUBLAYERS
from ...methods import SecondOrderMethod
from ..time import Rates, output_proj_seconds
from .base import CpuRun, PassCost, forward_cpu_bytes, hessian_flops, layer_cpu_bytes, output_proj_widths, pruned_layer
from .elimination import choosing, deepest, inverting


@dataclass(frozen=True)
class ReconstructCost(PassCost[SecondOrderMethod]):
    """Layer by layer in two halves: second moments on the pruned stream, choice and refit, and a forward of the result.

    With a target share a dense stream goes along; with an input share both norms' outputs have second moments too.
    """

    @property
    def streams(self) -> int:
        return 2 if self.method.effective_target_share else 1

    def flops(self) -> float:
        sizes, method = self.sizes, self.method
        forward, tokens, hidden = self.forward_flops(), sizes.samples * sizes.sequence_length, self.hidden_size
        flops = forward * (2 - sizes.ratio)
        flops += hessian_flops(sizes)
        if method.effective_target_share:  # the dense stream, and the stream error's moments with the inputs
            flops += forward + sum(2 * tokens * hidden * d for d in output_proj_widths(sizes))
        if method.effective_input_share:  # second moments of both norms' outputs, and of their change
            flops += 2 * len(sizes.shapes) * 3 * tokens * hidden**2
        return flops

    @property
    def hidden_size(self) -> int:
        return self.sizes.shapes[0].hidden_size

    def seconds(self, rates: Rates) -> float:
        sizes, method, tokens = self.sizes, self.method, self.sizes.tokens
        forward = self.forward_seconds(rates)
        seconds = forward * (2 - sizes.ratio) + (forward if method.effective_target_share else 0.0)
        for sublayer in SUBLAYERS:
            own = output_proj_seconds(sizes, sublayer, tokens, sizes.ratio, rates)
            seconds += own["hessian"] + own["inverse"] + own["eliminate"] + own["gram"]
            seconds += own["stream error"] + own["fit"] if method.effective_target_share else 0.0
        if method.effective_input_share:
            aligned = output_proj_seconds(sizes, ATTENTION, tokens, 0.0, rates)
            square = (sizes.shape.hidden_size / sizes.width(ATTENTION)) ** 2
            norms = 56 * tokens * sizes.shape.hidden_size / rates.memory
            seconds += 2 * (square * (aligned["hessian"] + aligned["stream error"] + aligned["inverse"]) + norms)
        return self.in_all(seconds)

    def device_bytes(self, batch: int, on_device: int) -> int:
        sizes, method = self.sizes, self.method
        layers = 2 * sizes.layer() + sizes.converted()
        # The layer before may still be on its way to the disk.
        standing = layers + pruned_layer(sizes) + sizes.placed(batch, on_device, self.streams, sizes.windows)
        peaks = []
        for sublayer in SUBLAYERS:
            aligned = sizes.matrices(sublayer) if method.effective_input_share else 0
            before = sizes.matrices(ATTENTION) * 2 if sublayer == FFN else 0  # aligned and pruned by then
            d = sizes.width(sublayer)
            observing = d * d * 4 + sizes.forward(sublayer, batch)
            if method.effective_target_share:
                observing += sizes.stream_error(sublayer, batch)
            # The dense FFN is through when its output projection is solved for; the attention's new output projection
            # is kept in float32.
            own = aligned if sublayer == ATTENTION else sizes.shape.hidden_size * sizes.width(ATTENTION) * 4
            cross = sizes.shape.hidden_size * d * 4 if method.effective_target_share else 0
            solving = max(cross + inverting(sizes, sublayer), choosing(sizes, sublayer, deepest(sizes)))
            peaks += [aligned + before + observing, own + solving]
        return standing + max(*peaks, sizes.forward(FFN, batch))

    def cpu_bytes(self, run: CpuRun) -> int:
        sizes = self.sizes
        hidden = sizes.hidden(sizes.windows)
        streams = 2 * hidden if self.method.effective_target_share else hidden
        width = max(output_proj_widths(sizes))
        # H, its inverse and the weights' products; the factor of what is removed; weights before and after in float32.
        solving = (3 * width**2 + width * width // 2 + 4 * sizes.shape.hidden_size * width) * 4
        forward = forward_cpu_bytes(sizes, run) - hidden + streams
        return max(forward, streams + layer_cpu_bytes(sizes, run) + solving)
