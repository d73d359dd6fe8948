"""What a run needs on a GPU, and how it is cut so that it stays within a budget: batches, and what lives in the host.

The figures are of what PyTorch holds of the device; a few hundred MB of CUDA itself come on top. They follow the
passes' code step by step; each term names its tensors.
"""

from dataclasses import dataclass, field

import torch

from ..allocation.common_size import common_sizes
from ..allocation.residual import deepest_cut
from ..architectures import ATTENTION, FFN, SUBLAYERS, LayerShape
from ..checkpoint import CheckpointWriter
from ..errors import InputError
from ..forward.layer_forward import micro_batch
from ..methods import Method, SecondOrderMethod, SemiStructuredMethod
from ..methods.second_order import CURVES, NONE

# Over what is alive at once. What PyTorch held on an H200, with segments that grow, was 0.4 to 16 % more than it had
# allocated, and 5 % less to 5 % more than predicted so (six runs of 13 B and 70 B shapes).
FRAGMENTATION = 1.02
# cuBLAS workspaces (32 MiB for each stream that multiplies) and the kernels' own.
WORKSPACE = 96 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """batch: windows in a micro-batch. on_device: sets of hidden states on the device (the others in pinned host
    memory). device_bytes, host_bytes: predicted peaks by pass."""

    batch: int
    on_device: int
    device_bytes: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def peak(self) -> int:
        return max(self.device_bytes.values(), default=0)


@dataclass(frozen=True)
class Sizes:
    """What the memory of a run on a GPU follows from; tokens of all windows are split over `processes`."""

    shapes: list[LayerShape]
    method: Method
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
    def allocation_windows(self) -> int:
        """Windows of the calibration pass."""
        method = self.method
        if isinstance(method, SecondOrderMethod) and method.dense_statistics == CURVES:
            return min(self.windows, -(-method.allocation_windows // self.processes))
        return self.windows

    @property
    def deepest(self) -> float:
        """Share of an FFN that goes at most."""
        share = deepest_cut(self.ratio) / 10
        if self.method.uniform:  # layers of several sizes are cut to one
            sizes = common_sizes(self.shapes, self.ratio, self.method.round_to)
            share = max(share, 1 - min(s.channels for s in sizes) / self.shape.intermediate_channels)
        return share

    @property
    def streams(self) -> int:
        return 2 if isinstance(self.method, SecondOrderMethod) and self.method.correction else 1

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


def calibration_peak(sizes: Sizes, batch: int, on_device: int) -> int:
    """One forward of the dense model and its statistics: moments, or for the curves Hessians."""
    curves = isinstance(sizes.method, SecondOrderMethod) and sizes.method.dense_statistics == CURVES
    layers = 2 * sizes.layer() + sizes.converted()
    standing = layers + sizes.placed(batch, on_device, 1, sizes.allocation_windows)
    peaks = []
    for sublayer in SUBLAYERS:
        d = sizes.width(sublayer)
        statistics = d * d * 4 if curves else 4 * d * 8
        peaks.append(statistics + sizes.forward(sublayer, batch))
        if curves:
            peaks += [inverting(sizes, sublayer), curve(sizes, sublayer)]
    return standing + max(peaks)


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


def prune_peak(sizes: Sizes, batch: int, on_device: int) -> int:
    """The prune pass: of a second-order method layer by layer in two halves, else of one forward or of none."""
    method = sizes.method
    layers = 2 * sizes.layer() + sizes.converted()
    pruned = int((1 - sizes.ratio) * sizes.layer())
    if not isinstance(method, SecondOrderMethod):
        if not method.sequential:
            return layers + CheckpointWriter.MOST_IN_FLIGHT * pruned
        if isinstance(method, SemiStructuredMethod):
            # The layer as stored, sparse, and converted for a forward beside what is on its way to the disk.
            standing = layers + 2 * sizes.layer() + sizes.placed(batch, on_device, 1, sizes.windows)
            statistics = sum(d * d for d in sizes.shape.input_widths) * 4 if method.from_hessian else 0
            forwards = max(sizes.forward(sublayer, batch) for sublayer in SUBLAYERS)
            return standing + max(statistics + forwards, sparsifying(sizes.shape, method.from_hessian))
        standing = layers + pruned + sizes.placed(batch, on_device, 1, sizes.windows)
        return standing + max(sizes.forward(sublayer, batch) for sublayer in SUBLAYERS)
    # The layer before may still be on its way to the disk.
    standing = layers + pruned + sizes.placed(batch, on_device, sizes.streams, sizes.windows)
    peaks = []
    for sublayer in SUBLAYERS:
        aligned = sizes.matrices(sublayer) if method.alignment else 0
        before = sizes.matrices(ATTENTION) * 2 if sublayer == FFN else 0  # aligned and pruned by then
        d = sizes.width(sublayer)
        observing = d * d * 4 + sizes.forward(sublayer, batch)
        if method.correction:
            observing += sizes.stream_error(sublayer, batch)
        # The dense FFN is through when its output projection is solved for; the attention's new output projection is
        # kept in float32.
        own = aligned if sublayer == ATTENTION else sizes.shape.hidden_size * sizes.width(ATTENTION) * 4
        cross = sizes.shape.hidden_size * d * 4 if method.correction else 0
        solving = max(cross + inverting(sizes, sublayer), choosing(sizes, sublayer, sizes.deepest))
        peaks += [aligned + before + observing, own + solving]
    return standing + max(*peaks, sizes.forward(FFN, batch))


def peaks(sizes: Sizes, batch: int, on_device: int) -> dict[str, int]:
    """Predicted bytes of each pass."""
    method, found = sizes.method, {}
    calibrates = method.dense_statistics != NONE if isinstance(method, SecondOrderMethod) else not method.sequential
    if method.needs_text and calibrates:
        found["calibration"] = calibration_peak(sizes, batch, on_device)
    found["prune"] = prune_peak(sizes, batch, on_device)
    return {name: int(peak * FRAGMENTATION) + WORKSPACE for name, peak in found.items()}


def plan_memory(sizes: Sizes, budget: int, batch: int | None = None) -> MemoryPlan:
    """The fastest way to run within `budget` bytes of the device; `batch`: the one that a run began with.

    Micro-batches of half the usual size still fill a GPU; hidden states in the host cross the bus several times a
    layer, mostly beside the computing. Smaller ones come last. InputError where nothing fits.
    """
    usual = min(micro_batch(torch.device("cuda"), sizes.sequence_length), max(1, sizes.windows))
    batches = sorted({max(1, usual // k) for k in (1, 2)}, reverse=True)
    smaller = sorted({max(1, usual // k) for k in (4, 8, 16)} - set(batches), reverse=True)
    if batch is not None:
        batches, smaller = [batch], []
    choices = [(own, n) for n in range(sizes.streams, -1, -1) for own in batches]
    choices += [(own, 0) for own in smaller]
    for own, on_device in choices:
        found = peaks(sizes, own, on_device)
        if max(found.values()) <= budget:
            # PyTorch takes pinned memory in powers of two.
            each = 1 << (sizes.hidden(sizes.windows) - 1).bit_length()
            return MemoryPlan(own, on_device, found, (sizes.streams - min(on_device, sizes.streams)) * each)
    least = min(max(peaks(sizes, own, 0).values()) for own in [*batches, *smaller])
    begun = "" if batch is None else f" with the batches of {batch} windows that the run began with"
    raise InputError(
        f"{budget / 1e9:.1f} GB of device memory are too few for this model and method: {least / 1e9:.1f} GB are needed"
        f" with hidden states in host memory{begun or ' and the smallest batches'}; raise "
        "--device-memory, or free memory of the device"
    )
