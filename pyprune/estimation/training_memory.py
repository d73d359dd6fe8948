"""Device memory of training masks on a whole model, and whether activations must be recomputed."""

from dataclasses import dataclass

import torch

from ..architectures import LayerShape
from ..architectures.channel_selection import SELECTIONS, width
from ..checkpoint import ModelSource
from ..errors import InputError
from ..mask_training.hypernetwork import STATE_WIDTH
from ..mask_training.policy_learner import MASKS
from ..methods.base import Training

# Buffers that libraries keep, and what the allocator rounds up.
OVERHEAD_BYTES = 1 << 30


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes: `weights` of the model; `activations` of a step that keeps every layer's, or `recomputed` one layer's and
    all layers' inputs; `logits` of the loss; `learner`, its parameters, gradients and moments."""

    weights: int
    activations: int
    recomputed: int
    logits: int
    learner: int

    def peak(self, checkpointing: bool) -> int:
        return self.weights + self.learner + self.logits + (self.recomputed if checkpointing else self.activations)


def training_memory(reader: ModelSource, method: Training, sequence_length: int, dtype: torch.dtype) -> TrainingMemory:
    """Predict the memory of training on the checkpoint in a compute type, with windows of `sequence_length`."""
    return memory_of(
        reader.shapes, reader.parameters, reader.config.vocab_size, method, sequence_length, dtype.itemsize
    )


def memory_of(
    shapes: list[LayerShape], parameters: int, vocabulary: int, method: Training, sequence_length: int, itemsize: int
) -> TrainingMemory:
    """`training_memory` of a model of these layers, parameters in all and vocabulary; itemsize: of the compute type."""
    weights = parameters * itemsize
    tokens = method.rows * sequence_length * (1 if method.backward else MASKS)
    layer = max(layer_activations(shape, tokens, itemsize) for shape in shapes)
    # Logits in the compute type and in float32, their log-softmax, and going backward the gradient of both.
    logits = tokens * vocabulary * (itemsize + 8 + (4 + itemsize if method.backward else 0))
    if not method.backward:
        learner = 16 * sum(shape.kv_groups + shape.intermediate_channels for shape in shapes)
        return TrainingMemory(weights, layer // 2, layer // 2, logits, learner)  # nothing is kept for a way back
    learner = 16 * sum(2 * STATE_WIDTH * width(shape, name) for shape in shapes for name in SELECTIONS)
    inputs = len(shapes) * tokens * shapes[0].hidden_size * itemsize
    return TrainingMemory(weights, len(shapes) * layer, inputs + layer, logits, learner)


def layer_activations(shape: LayerShape, tokens: int, itemsize: int) -> int:
    """Bytes that the backward pass of one masked layer with frozen weights keeps for `tokens` tokens.

    Both norms: their input in float32; the values that four masks multiply; turned queries and keys, values, and the
    attention's output; gate, its activation, up, and their product.
    """
    hidden, middle = shape.hidden_size, shape.intermediate_channels
    heads = shape.kv_groups * shape.group_width + shape.kv_groups * shape.head_dim
    return tokens * (hidden * (8 + 4 * itemsize) + 2 * heads * itemsize + 4 * middle * itemsize)


def check_fits(memory: TrainingMemory, budget: int, method: str) -> bool:
    """Return whether the backward must recompute layers to stay within `budget`; InputError: it does not fit."""
    if memory.peak(False) + OVERHEAD_BYTES <= budget:
        return False
    least = memory.peak(True) + OVERHEAD_BYTES
    if least > budget:
        raise InputError(
            f"{method} trains on the whole model: that takes {least / 1e9:.1f} GB of device memory (weights "
            f"{memory.weights / 1e9:.1f} GB), {budget / 1e9:.1f} GB are there; take a shorter --sequence-length, fewer "
            "--rows, or a method that goes layer by layer: obs, flap"
        )
    return True
