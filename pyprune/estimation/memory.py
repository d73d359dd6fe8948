"""Plan a run within a budget of GPU memory: micro-batches, and what stays in host memory."""

from dataclasses import dataclass, field

import torch

from ..errors import InputError
from ..forward.layer_forward import micro_batch
from .procedures import Costs, costs_of
from .sizes import Sizes

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


def peaks(costs: Costs, batch: int, on_device: int) -> dict[str, int]:
    """Predicted bytes of each pass."""
    return {name: int(own.device_bytes(batch, on_device) * FRAGMENTATION) + WORKSPACE for name, own in costs.items()}


def plan_memory(sizes: Sizes, budget: int, batch: int | None = None) -> MemoryPlan:
    """The fastest way to run within `budget` bytes of the device; `batch`: the one that a run began with.

    Micro-batches of half the usual size still fill a GPU; hidden states in the host cross the bus several times a
    layer, mostly beside the computing. Smaller ones come last. InputError where nothing fits.
    """
    costs = costs_of(sizes)
    streams = max(own.streams for own in costs.values())
    usual = min(micro_batch(torch.device("cuda"), sizes.sequence_length), max(1, sizes.windows))
    batches = sorted({max(1, usual // k) for k in (1, 2)}, reverse=True)
    smaller = sorted({max(1, usual // k) for k in (4, 8, 16)} - set(batches), reverse=True)
    if batch is not None:
        batches, smaller = [batch], []
    choices = [(own, n) for n in range(streams, -1, -1) for own in batches]
    choices += [(own, 0) for own in smaller]
    for own, on_device in choices:
        found = peaks(costs, own, on_device)
        if max(found.values()) <= budget:
            # PyTorch takes pinned memory in powers of two.
            each = 1 << (sizes.hidden(sizes.windows) - 1).bit_length()
            return MemoryPlan(own, on_device, found, (streams - min(on_device, streams)) * each)
    least = min(max(peaks(costs, own, 0).values()) for own in [*batches, *smaller])
    begun = "" if batch is None else f" with the batches of {batch} windows that the run began with"
    raise InputError(
        f"{budget / 1e9:.1f} GB of device memory are too few for this model and method: {least / 1e9:.1f} GB are needed"
        f" with hidden states in host memory{begun or ' and the smallest batches'}; raise "
        "--device-memory, or free memory of the device"
    )
