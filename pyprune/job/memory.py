"""Fit a run into its device's memory."""

import torch

from ..checkpoint import ModelSource
from ..errors import InputError
from ..estimation.memory import MemoryPlan, plan_memory
from ..estimation.sizes import Sizes
from ..estimation.training_memory import check_fits, training_memory
from ..forward.layer_forward import micro_batch
from ..methods import Method
from ..runtime import distributed
from ..runtime.device import check_room, free_memory, release_cache, usable_memory
from .config import PruneConfig


def fit_memory(
    reader: ModelSource,
    method: Method,
    ratio: float,
    config: PruneConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch: int | None,
) -> MemoryPlan:
    """Plan micro-batches within --device-memory, or within what the device has free; `batch`: of a resumed run.

    Raises:
        InputError: nothing fits, or --device-memory is given for a CPU.
    """
    budget = config.device_memory
    if device.type != "cuda":
        if budget is not None:
            raise InputError("--device-memory is for a CUDA device; this run is on the CPU")
        return MemoryPlan(micro_batch(device, config.sequence_length), 2)
    if budget is None:
        budget = usable_memory(device)
    else:
        release_cache(device)
        free = free_memory(device)
        check_room(device, budget, torch.cuda.memory_reserved(device), free)
        budget = min(budget, free)
    sizes = Sizes(
        reader.shapes,
        method,
        ratio,
        config.samples,
        config.sequence_length,
        dtype.itemsize,
        reader.dtype.itemsize,
        distributed.world_size(),
    )
    total = torch.cuda.get_device_properties(device).total_memory
    return plan_memory(sizes, distributed.all_reduce_min(min(budget, total)), batch)


def fit_training(
    reader: ModelSource, method: Method, config: PruneConfig, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether a method that trains has to compute activations again going backward. InputError: it cannot run."""
    training = method.training
    if training is None:
        return False
    if distributed.world_size() > 1:
        raise InputError(f"{method.name} trains in one process: start it without torchrun")
    memory = training_memory(reader, training, config.sequence_length, dtype)
    return check_fits(memory, config.device_memory or usable_memory(device), method.name)
