"""No-op writer for ranks other than the main one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from . import CheckpointWriter
from .shard_plan import ShardPlan, plan_shards
from .unfinished import partial_of


class NullWriter(CheckpointWriter):
    """Stand in for the writer in every process of a run but the first.

    It knows the parts that were there when the run began (`done`), reads them in the shared folder, and discards the
    tensors that it is given.
    """

    def __init__(self, output: Path, done: dict[int, dict[str, Any]]) -> None:
        self.output = output.resolve()
        self.partial = partial_of(output)
        self.plan = ShardPlan((), {}, {}, {})
        self.done = done
        self.bytes_written, self.wait_seconds = 0, 0.0

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    begin = write = flush = settle = close = discard = _ignore

    def lay_out(self, parts: Sequence[Mapping[str, Tensor]], shard_size: int) -> None:
        self.plan = plan_shards(self.partial, parts, shard_size)

    def write_index(self) -> None:
        raise RuntimeError("only the first process completes the output")

    finish = write_index
