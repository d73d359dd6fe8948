"""Cost of each kind of pass: FLOPs, seconds on a GPU, bytes of the device; and the passes of a method.

Bytes are of what PyTorch holds of the device; a few hundred MB of CUDA itself come on top. They follow the passes' code
step by step; each term names its tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..allocation.common_size import common_sizes
from ..allocation.residual import deepest_cut
from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..checkpoint import CheckpointWriter
from ..mask_training.policy_learner import MASKS
from ..methods import Method, ScoringMethod, SecondOrderMethod, SemiStructuredMethod
from ..methods.base import Training
from ..methods.second_order import CURVES, NONE
from .sizes import Sizes
from .time import (
    CURVE_SHARE,
    OVERHEAD,
    TRAINING_SHARE,
    Rates,
    output_proj_seconds,
    sparsifying_seconds,
    sublayer_seconds,
)
from .training_memory import TrainingMemory

MethodT = TypeVar("MethodT", bound=Method, covariant=True)


@dataclass(frozen=True)
class CpuRun:
    """Of a run on a CPU: windows in a micro-batch, bytes of the embeddings, and whether weights are converted."""

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
        """Of forwards over the text, and of second moments (one triangle); 0: the pass looks at no text."""
        return 0.0

    def seconds(self, rates: Rates) -> float:
        """On a GPU, over all layers, weights being there and files not waited for."""
        return 0.0

    @abstractmethod
    def device_bytes(self, batch: int, on_device: int) -> int:
        """Peak bytes, with micro-batches of `batch` windows and `on_device` sets of hidden states on the device."""

    @abstractmethod
    def cpu_bytes(self, run: CpuRun) -> int:
        """The most alive at once on a CPU, beside the interpreter and libraries."""

    def forward_flops(self) -> float:
        return sum(forward_flops(shape, self.sizes.samples, self.sizes.sequence_length) for shape in self.sizes.shapes)

    def forward_seconds(self, rates: Rates) -> float:
        """Of one layer."""
        return sum(sublayer_seconds(self.sizes, sublayer, self.sizes.tokens, rates) for sublayer in SUBLAYERS)

    def moments_seconds(self, rates: Rates) -> float:
        """Of one layer's channel moments."""
        return sum(2 * self.sizes.tokens * self.sizes.width(sublayer) for sublayer in SUBLAYERS) / rates.memory

    def in_all(self, seconds: float) -> float:
        """From one layer's seconds to the pass's."""
        return OVERHEAD * len(self.sizes.shapes) * seconds


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
        if method.effective_input_share:  # second moments of what both norms put out, and of its change
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


@dataclass(frozen=True)
class TrainCost:
    """Training masks on the whole frozen model.

    recompute: whether layers are computed again going backward.
    """

    shapes: list[LayerShape]
    training: Training
    sequence_length: int
    memory: TrainingMemory
    recompute: bool

    def flops(self) -> float:
        """Forwards of the drawn masks, or a forward, the way back to the gates, and a forward again; of all steps."""
        rows, length = self.training.rows, self.sequence_length
        forward = self.training.steps * sum(forward_flops(shape, rows, length) for shape in self.shapes)
        return forward * ((3 if self.recompute else 2) if self.training.backward else MASKS)

    def seconds(self, rates: Rates) -> float:
        return self.flops() / (TRAINING_SHARE[self.training.backward] * rates.matmul)

    def device_bytes(self) -> int:
        return self.memory.peak(self.recompute)


@dataclass(frozen=True)
class UncountedCalibrationCost(CalibrationCost[Method]):
    """A forward that takes memory, and whose work is little beside that of training masks: the refit's."""

    def flops(self) -> float:
        return 0.0


def forward_flops(shape: LayerShape, samples: int, sequence_length: int) -> float:
    """Multiply-adds of the linears, twice, and causal attention (half of the score matrix)."""
    tokens = samples * sequence_length
    heads = shape.kv_groups * shape.heads_per_group
    return tokens * (2 * shape.parameters + 2 * heads * shape.head_dim * sequence_length)


def output_proj_widths(sizes: Sizes) -> list[int]:
    """Input channels of every output projection."""
    return [shape.units(m) * shape.unit_width(m) for shape in sizes.shapes for m in SUBLAYERS]


def hessian_flops(sizes: Sizes) -> float:
    return sum(sizes.samples * sizes.sequence_length * d**2 for d in output_proj_widths(sizes))


def deepest(sizes: Sizes[SecondOrderMethod]) -> float:
    """Share of an FFN that goes at most."""
    method = sizes.method
    share = deepest_cut(method.ratio_within(sizes.shapes, sizes.ratio)) / 10
    if method.uniform:  # layers of several sizes are cut to one
        common = common_sizes(sizes.shapes, sizes.ratio, method.round_to)
        share = max(share, 1 - min(s.channels for s in common) / sizes.shape.intermediate_channels)
    return share


def pruned_layer(sizes: Sizes) -> int:
    """A layer as it is written; a whole one where some stay whole."""
    return sizes.layer() if sizes.method.spares_layers else int((1 - sizes.ratio) * sizes.layer())


def inverting(sizes: Sizes, sublayer: str) -> int:
    """H, its inverse, and the panels of the sweep."""
    d = sizes.width(sublayer)
    return 2 * d * d * 4 + 6 * 256 * d * 4


def choosing(sizes: Sizes, sublayer: str, removed: float) -> int:
    """The inverse, WᵀW, the panels of the elimination, the factor of what goes, and W in float32 before and after."""
    d = sizes.width(sublayer)
    return 2 * d * d * 4 + 20 * 128 * d * 4 + int(removed * d) * d * 4 + 2 * sizes.shape.hidden_size * d * 4


def curve(sizes: Sizes, sublayer: str) -> int:
    """As choosing for an error curve: no factor and no new W, but H is kept until the curve is known to be enough."""
    d = sizes.width(sublayer)
    return 3 * d * d * 4 + 20 * 128 * d * 4 + sizes.shape.hidden_size * d * sizes.compute_bytes


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


def widest_ffn(sizes: Sizes) -> LayerShape:
    return max(sizes.shapes, key=lambda shape: shape.intermediate_channels)


def layer_cpu_bytes(sizes: Sizes, run: CpuRun) -> int:
    """A layer in the compute type, and as stored where that is another."""
    return sizes.shape.parameters * sizes.compute_bytes + (sizes.layer() if run.converts else 0)


def forward_cpu_bytes(sizes: Sizes, run: CpuRun) -> int:
    """Hidden states, one layer, and a micro-batch of its temporaries."""
    shape = widest_ffn(sizes)
    tokens = run.batch * sizes.sequence_length
    # Of the FFN, gate, up, their activation and the product are alive at once; of the residual stream four copies.
    temporaries = tokens * (4 * shape.intermediate_channels + 4 * shape.hidden_size) * sizes.compute_bytes
    return sizes.hidden(sizes.windows) + layer_cpu_bytes(sizes, run) + temporaries


Costs = dict[str, PassCost]  # by the pass's name, in the order in which they run


def slice_costs(sizes: Sizes[ScoringMethod]) -> Costs:
    if sizes.method.sequential:
        return {"prune": SequentialSliceCost(sizes)}
    if not sizes.method.needs_text:
        return {"prune": SliceCost(sizes)}
    return {"calibration": CalibrationCost(sizes), "prune": SliceCost(sizes)}


def reconstruct_costs(sizes: Sizes[SecondOrderMethod]) -> Costs:
    statistics = sizes.method.dense_statistics
    if statistics == NONE:
        return {"prune": ReconstructCost(sizes)}
    calibration = CurvesCost(sizes) if statistics == CURVES else CalibrationCost(sizes, moments_count=False)
    return {"calibration": calibration, "prune": ReconstructCost(sizes)}


def sparsify_costs(sizes: Sizes[SemiStructuredMethod]) -> Costs:
    return {"prune": SparsifyCost(sizes)}


def selection_costs(sizes: Sizes[Method]) -> Costs:
    """Beside the training, whose cost is a `TrainCost`."""
    return {"calibration": UncountedCalibrationCost(sizes), "prune": SliceCost(sizes)}


def unit_training_costs(sizes: Sizes[Method]) -> Costs:
    """Beside the training, whose cost is a `TrainCost`."""
    return {"calibration": CalibrationCost(sizes), "prune": SliceCost(sizes)}


# `Method.procedure` -> the costs of its passes; `passes.PASSES` has the passes by the same names.
PROCEDURES: dict[str, Callable[[Sizes[Any]], Costs]] = {
    "slice": slice_costs,
    "reconstruct": reconstruct_costs,
    "sparsify": sparsify_costs,
    "train-selections": selection_costs,
    "train-units": unit_training_costs,
}


def costs_of(sizes: Sizes) -> Costs:
    """Cost of each pass of the method."""
    return PROCEDURES[sizes.method.procedure](sizes)
