"""No-op writer for ranks other than the main one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import CheckpointWriter
from .writer import partial_of


class NullWriter(CheckpointWriter):
    """Stands in for the writer in all processes of a run but the first: it knows the shards that were there when the
    run began (`done`), reads them in the shared folder, and discards what it is given.
    """

    def __init__(self, output: Path, shards: int, done: dict[int, dict[str, Any]]) -> None:
        self.output = output.resolve()
        self.partial = partial_of(output)
        self.shards, self.done = shards, done
        self.bytes_written, self.wait_seconds = 0, 0.0

    def begin(self) -> None:
        pass

    def write(
        self,
        shard: int,
        tensors: dict[str, Tensor],
        record: Any = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        pass

    def flush(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass

    def write_index(self) -> None:
        raise RuntimeError("only the first process completes the output")

    finish = write_index
