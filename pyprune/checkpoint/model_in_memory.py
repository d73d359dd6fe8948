"""A model that exists in memory alone: configuration, tensors, tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IN_MEMORY = " (in memory)"  # ends the name of a model that was no folder


@dataclass(frozen=True, eq=False)
class ModelInMemory:
    """What `load_model` and `load_tokenizer` take in the place of a folder; `str` names the model in messages.

    state: tensors by the names of the configuration's class. Who loads the model may share their memory. device, dtype:
    of the model's first parameter.
    """

    name: str
    config: Any
    state: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    generation_config: Any = None
    tokenizer: Any = None

    def __str__(self) -> str:
        return f"{self.name}{IN_MEMORY}"
