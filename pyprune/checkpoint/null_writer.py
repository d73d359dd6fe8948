"""No-op writer for ranks other than the main one."""

from pathlib import Path
from typing import Any

from . import CheckpointWriter
from .writer import partial_of


class NullWriter(CheckpointWriter):
    """Stand in for the writer in every process of a run but the first.

    It knows the shards that were there when the run began (`done`), reads them in the shared folder, and discards the
    tensors that it is given.
    """

    def __init__(self, output: Path, shards: int, done: dict[int, dict[str, Any]]) -> None:
        self.output = output.resolve()
        self.partial = partial_of(output)
        self.shards, self.done = shards, done
        self.bytes_written, self.wait_seconds = 0, 0.0

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    begin = write = flush = settle = close = discard = _ignore

    def write_index(self) -> None:
        raise RuntimeError("only the first process completes the output")

    finish = write_index
