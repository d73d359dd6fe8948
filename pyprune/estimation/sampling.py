"""Cost of text that the model writes itself: the whole model, one token of every window at a time."""

from dataclasses import dataclass

import torch

from ..architectures import LayerShape
from .procedures.base import forward_flops
from .time import Rates

# Of one layer in one step, through transformers' generate: its kernels wait for Python. Measured at 2.7 to 3.5 ms with
# a 7B shape on an H200 (transformers 5.17; 1 to 279 windows at once); a faster host takes less.
LAYER_SECONDS = 2.9e-3
# As calibration.sampling takes windows at once: their cache fills this share of a GPU, or this much of main memory.
GPU_SHARE, CPU_BYTES = 4, 4 << 30


@dataclass(frozen=True)
class SamplingCost:
    """Sizes of the model, the text, and the device. weights: bytes of the whole model in the compute type."""

    shapes: list[LayerShape]
    weights: int
    samples: int
    sequence_length: int
    compute_bytes: int
    cache_budget: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return sum(2 * shape.kv_groups * shape.head_dim for shape in self.shapes) * self.compute_bytes

    @property
    def batch(self) -> int:
        """Windows at once."""
        return min(self.samples, max(1, self.cache_budget // (self.token_bytes * self.sequence_length)))

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch) * self.sequence_length

    def flops(self) -> float:
        outside = self.weights // self.compute_bytes - sum(shape.parameters for shape in self.shapes)
        head = self.samples * self.sequence_length * outside  # half of it, the embeddings, multiplies nothing
        return head + sum(forward_flops(shape, self.samples, self.sequence_length) for shape in self.shapes)

    def moved(self) -> float:
        """Bytes read: the weights in every step, and the cache, half full on average."""
        cache = self.samples * self.sequence_length**2 * self.token_bytes / 2
        return self.steps * self.weights + cache

    def waiting(self) -> float:
        return self.steps * len(self.shapes) * LAYER_SECONDS

    def seconds(self, rates: Rates) -> float:
        """On a GPU: whichever of host, memory and arithmetic is slowest."""
        return max(self.waiting(), self.moved() / rates.memory, self.flops() / rates.matmul)

    def cpu_seconds(self, rate: float) -> float:
        return self.waiting() + self.flops() / rate

    def device_bytes(self) -> int:
        return self.weights + self.batch * self.sequence_length * self.token_bytes


def cache_budget(device: torch.device, memory: int | None) -> int:
    """Bytes that the sampled windows' keys and values may take; memory: of a GPU that is asked about by name."""
    if memory is not None:
        return memory // GPU_SHARE
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
    return CPU_BYTES
