"""A checkpoint in another layout: configuration, tensors of a layer, files beside them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A safetensors layout of one checkpoint.

    `config` becomes config.json; `convert` turns a layer's tensors, named within the layer, into those to write (any
    device, meta included); `files` are further files by name. `notes` is what its user should know.
    """

    config: Any
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """The class that loads it."""
        return self.config.architectures[0]
