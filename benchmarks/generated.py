"""A model that needs no disk: layers are made on the device when asked for, and what is written is counted and dropped.

Everything between the two, passes, statistics, choice and rewriting, is pyprune's own. The checkpoint folder holds a
configuration, a tokenizer and headers (`make_checkpoint(..., headers_only=True)`); a layer's tensors are those that
`make_checkpoint` would have written, so both give the same record.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pyprune.checkpoint import CheckpointReader, CheckpointWriter, Digests, LayerPrefetcher, layer_loader
from pyprune.checkpoint.content import Content
from pyprune.checkpoint.headers import StoredTensor
from pyprune.checkpoint.shard_file import _host_bytes
from pyprune.job.config import PruneConfig
from pyprune.job.job import Job
from pyprune.job.record import PruneRecord
from pyprune.passes import make_passes
from pyprune.pipeline.finalize import finalize
from pyprune.pipeline.run import prune
from pyprune.runtime.device import memory_limit
from pyprune.runtime.progress import Progress
from pyprune.testing.random_checkpoint import RandomWeights

SEED = 0


class Unread(Content):
    """Of tensors that are made when they are asked for: there is nothing that could change."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        super().__init__(folder)
        self.digests = dict.fromkeys(names, "generated")

    def saw(self, name: str, digest: str) -> None:
        pass


class GeneratedReader(CheckpointReader):
    """A checkpoint of which only the headers exist; tensors are made on the device and given out on the CPU."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder)
        self.content = Unread(folder, self.tensors)
        self.weights = RandomWeights(self.config, SEED, device)
        self._table: Tensor | None = None

    def read(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self.weights.tensor(name).cpu() for name in names}

    def embed(self, ids: Tensor) -> Tensor:
        if self._table is None:  # made once: it is looked up window by window
            self._table = self.read([self.family.embeddings])[self.family.embeddings]
        return self._table[ids]


class GeneratedLoader:
    """pyprune's `LayerPrefetcher` for a generated model: one layer ahead, and what is waited for is its making."""

    def __init__(self, reader: GeneratedReader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.bytes_read = 0
        self.wait_seconds = 0.0

    def layers(self, first: int = 0, stop: int | None = None) -> Iterator[dict[str, Tensor]]:
        stop = self.reader.layers if stop is None else stop
        following = self._make(first) if first < stop else {}
        for layer in range(first, stop):
            tensors, following = following, self._make(layer + 1) if layer + 1 < stop else {}
            yield tensors
            tensors.clear()

    def _make(self, layer: int) -> dict[str, Tensor]:
        start = perf_counter()
        prefix = self.reader.layer_prefix(layer)
        names = self.reader.family.layer_state_shapes(self.reader.config, layer)
        tensors = {name: self.reader.weights.tensor(prefix + name).to(self.device) for name in names}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        self.wait_seconds += perf_counter() - start
        return tensors


class GeneratedJob(Job):
    """A job whose layers are made rather than read."""

    def __init__(self, options: PruneConfig, progress: Progress) -> None:
        super().__init__(options, progress)
        self.reader = GeneratedReader(Path(options.model), self.device)
        self.loaders: list[GeneratedLoader] = []

    def loader(self) -> GeneratedLoader:
        self.loaders.append(GeneratedLoader(self.reader, self.device))
        return self.loaders[-1]


class DiscardingWriter(CheckpointWriter):
    """Copies every part to the host in the writer's own thread and way, and drops it there: its files stay empty."""

    def _write(self, part: int, tensors: dict[str, Tensor], record: Any, sources: Digests) -> None:
        size = sum(len(view) for _, view in _host_bytes(iter(tensors.items()), self._stream))
        self.done[part] = {
            "part": part,
            "checksums": dict.fromkeys(tensors, ""),
            "tensor_bytes": size,
            "sources": sources,
            "record": record,
        }
        self.bytes_written += size

    def prove(self) -> dict[str, StoredTensor]:
        """Where each tensor would be: there are no bytes to compare."""
        self.flush()
        return self.plan.tensors


def prune_generated(options: PruneConfig, progress: Progress) -> tuple[PruneRecord, dict[str, Any]]:
    """As `pyprune.pipeline.run.prune` of a folder of headers; the record, and the traffic (see `traffic`)."""
    job = GeneratedJob(options, progress)
    writer = DiscardingWriter(options.output, job.identity, resume=False)
    passes = make_passes(job, writer)
    writer.begin()
    with memory_limit(job.device, options.device_memory):
        outcome = passes.execute()
    record = finalize(job, writer, passes, outcome)
    return record, traffic(job.loaders, writer)


def prune_counted(options: PruneConfig, progress: Progress) -> tuple[PruneRecord, dict[str, Any]]:
    """`pyprune.pipeline.run.prune`; the record, and the traffic of its loaders and its writer."""
    loaders: list[LayerPrefetcher] = []
    writers: list[CheckpointWriter] = []

    def remembered(kind: Callable[..., Any], made: list[Any]) -> Callable[..., Any]:
        def make(*arguments: Any, **named: Any) -> Any:
            made.append(kind(*arguments, **named))
            return made[-1]

        return make

    with (
        patch("pyprune.job.job.layer_loader", remembered(layer_loader, loaders)),
        patch("pyprune.pipeline.run.CheckpointWriter", remembered(CheckpointWriter, writers)),
    ):
        record = prune(options, progress)
    return record, traffic(loaders, writers[0])


def traffic(loaders: Sequence[LayerPrefetcher | GeneratedLoader], writer: CheckpointWriter) -> dict[str, Any]:
    """Bytes of the layers read, in all passes, and of the files written; seconds that the passes waited for either."""
    return {
        "bytes_read": sum(loader.bytes_read for loader in loaders),
        "bytes_written": writer.bytes_written,
        "read_wait_seconds": sum(loader.wait_seconds for loader in loaders),
        "write_wait_seconds": writer.wait_seconds,
    }
