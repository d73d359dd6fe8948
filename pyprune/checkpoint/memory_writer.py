"""Writer that keeps what it is given in memory, for a pruning without an output."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import CheckpointWriter


class MemoryWriter(CheckpointWriter):
    """Collects the tensors of all parts in `tensors`, by full name, on the CPU; no part counts as one to resume."""

    def __init__(self) -> None:
        self.done = {}
        self.tensors: dict[str, Tensor] = {}
        self.bytes_written, self.wait_seconds = 0, 0.0

    def own_file(self, name: str) -> Path | None:
        return None

    def begin(self) -> None:
        pass

    def lay_out(self, parts: Sequence[Mapping[str, Tensor]], shard_size: int) -> None:
        pass

    def write(
        self,
        part: int,
        tensors: dict[str, Tensor],
        record: Any = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        for name, tensor in tensors.items():  # a view would hold what it was cut from, and share it
            self.tensors[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def flush(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def discard(self) -> None:
        self.tensors.clear()

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write_index(self) -> None:
        raise RuntimeError("a pruning without an output writes no files")

    finish = write_index
