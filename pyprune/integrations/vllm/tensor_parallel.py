"""Numbers of devices over which vLLM can split a pruned model with different numbers of units by layer."""

from collections.abc import Sequence

from ...architectures import LayerShape
from ...errors import InputError


def check_tensor_parallel(shapes: Sequence[LayerShape], size: int) -> None:
    """Check that every layer can be split over `size` devices (vLLM's `tensor_parallel_size`).

    Each device gets 1/size of a layer's query heads and FFN channels. It gets as many of its KV groups where they
    are a multiple of `size`; where there are fewer and `size` is a multiple of them, vLLM keeps each key and value
    head on size/groups devices, and their KV cache as often. InputError names the first layer that does not divide
    and the smaller sizes that would do.
    """
    for layer, shape in enumerate(shapes):
        obstacle = _obstacle(shape, size)
        if obstacle is not None:
            possible = [str(n) for n in range(1, size) if all(_obstacle(each, n) is None for each in shapes)]
            raise InputError(
                f"layer {layer} cannot be split over {size} devices: {obstacle}; tensor_parallel_size may be "
                f"{', '.join(possible)}, and pipeline_parallel_size uses more devices"
            )


def _obstacle(shape: LayerShape, size: int) -> str | None:
    """Name the size of the layer that does not divide, or None."""
    groups, heads = shape.kv_groups, shape.kv_groups * shape.heads_per_group
    if groups % size and size % groups:
        return f"its {groups} KV groups are neither a multiple nor a divisor of {size}"
    if heads % size:
        return f"its {heads} query heads are no multiple of {size}"
    if shape.intermediate_channels % size:
        return f"its {shape.intermediate_channels} FFN channels are no multiple of {size}"
    return None
