"""Writes a checkpoint whole or not at all: layer by layer into OUTPUT.partial, a journal, one final rename."""

import errno
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .content import Digests, prove_files
from .headers import INDEX, StoredTensor, load_stored
from .journal import FORMAT, JOURNAL, append_to_journal, rewrite_journal
from .ownership import FolderLock
from .preflight import check_output_free
from .shard_file import is_reserved, reserve_shard, write_tensors
from .shard_plan import ShardPlan, plan_shards
from .unfinished import WEIGHTS, partial_of, restore

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the parts of a checkpoint, a layer each, into the files of `<output>.partial`; `finish` renames it.

    The files are planned by `lay_out`, before the first part, from the tensors' shapes and types. Each has its full
    size and its header from the beginning; a part is written to its place, which may be in two files, and nothing is
    written twice.

    journal.jsonl holds one JSON document a line: first `{"format": ..., "identity": ..., "source": ...}`, what the run
    depends on; then one line for each finished part, `{"part": k, "checksums": {tensor: digest}, "tensor_bytes": n,
    "sources": {tensor: digest}, "record": ...}`. A part counts once its line is there, which is after its bytes
    reached the disk, and on a resume if they still have the digests that they had in memory. `record` is whatever the
    caller wants back on resume, `sources` the digests of the tensors that the part was made from.

    Parts are written by threads, `in_flight` at a time, while the caller goes on; `done` holds those that count. An
    error of a thread is raised by a later `write`, or by `flush`, `write_index` or `finish`; its part is then not in
    the journal. `bytes_written` counts the files' bytes, `wait_seconds` how long the caller had to wait for a thread.

    One process at a time works in the partial folder: InputError for the others.
    """

    MOST_IN_FLIGHT = 2  # one is copied and handed to the system while the other is brought to the disk

    def __init__(
        self, output: Path, identity: dict[str, Any], resume: bool, source: dict[str, Any] | None = None
    ) -> None:
        self.output = output = output.resolve()
        self.partial = partial_of(output)
        self.plan = ShardPlan((), {}, {}, {})
        self.done: dict[int, dict[str, Any]] = {}
        self.bytes_written = 0
        self.wait_seconds = 0.0
        self.in_flight = 1
        self._threads = ThreadPoolExecutor(self.MOST_IN_FLIGHT, thread_name_prefix="part")
        self._pending: deque[Future[None]] = deque()
        self._journal_lock = Lock()
        self._stream: torch.cuda.Stream | None = None
        self._lock: FolderLock | None = None
        check_output_free(output)
        if self.partial.exists() and not resume:
            raise InputError(f"{self.partial}: an unfinished run; add --resume to finish it, or delete that folder")
        if self.partial.exists() and not self.partial.is_dir():
            raise InputError(f"{self.partial}: is in the way; move that file, or name another output")
        self.head: dict[str, Any] = {"format": FORMAT, "identity": identity, "source": source or {}}
        if self.partial.exists():
            self._lock = FolderLock(self.partial)
            try:
                self.head, self.done = restore(self.partial, self.head)
            except BaseException:
                self.close()
                raise

    def begin(self) -> None:
        """Make the partial folder, or tidy the journal of the run that is resumed; until here nothing is written."""
        if self._lock is None:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.partial.mkdir()
            except FileExistsError as error:
                raise InputError(f"{self.partial}: another run began there just now; name another output") from error
            self._lock = FolderLock(self.partial)
            check_output_free(self.output)  # a run that was the first may be through by now
        rewrite_journal(self.partial / JOURNAL, [self.head, *self.done.values()])

    def lay_out(self, parts: Sequence[Mapping[str, Tensor]], shard_size: int) -> None:
        """Plan the files, and make each with its header; `begin` was called.

        Parts of a resumed run count as before where their files are those of the plan, and not otherwise: another
        choice of units has other sizes.

        Args:
            parts: tensors by full name, of which shapes and types matter, on any device, meta included.
            shard_size: bytes of tensors in a file at most; a tensor above it has a file to itself.

        Raises:
            ValueError: a tensor of a type that no checkpoint has.
            OSError: with the file's name; the system refuses.
        """
        self.plan = plan = plan_shards(self.partial, parts, shard_size)
        missing = {file for file, header in plan.headers.items() if not is_reserved(file, header, plan.sizes[file])}
        counting = {part: entry for part, entry in self.done.items() if self._planned(entry, missing)}
        if counting.keys() != self.done.keys():
            self.done = counting
            rewrite_journal(self.partial / JOURNAL, [self.head, *self.done.values()])
        for file in self.partial.glob(WEIGHTS):
            if file not in plan.headers:
                file.unlink()
        (self.partial / INDEX).unlink(missing_ok=True)
        for file in sorted(missing):
            reserve_shard(file, plan.headers[file], plan.sizes[file])
            self.bytes_written += len(plan.headers[file])
        sync(self.partial)

    def _planned(self, entry: dict[str, Any], missing: set[Path]) -> bool:
        """Return whether a part has the plan's tensors, in files that are there."""
        if not 0 <= entry["part"] < len(self.plan.parts):
            return False
        names = self.plan.parts[entry["part"]]
        return entry["checksums"].keys() == set(names) and all(self.plan.tensors[n].file not in missing for n in names)

    def settle(self) -> None:
        """Let the threads finish the parts that they are at: `done` is final, and nothing more can be written.

        No error is raised: a resume writes those parts again.
        """
        self._threads.shutdown()

    def close(self) -> None:
        """Settle, and let other processes in."""
        self.settle()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def discard(self) -> None:
        """Remove what was written: there is nothing to resume. What another run wrote stays."""
        self.settle()
        if self._lock is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def sources(self) -> Digests:
        """Digests of the tensors that the parts which count were made from."""
        known: Digests = dict(self.head.get("source", {}).get("digests", {}))
        for entry in self.done.values():
            known |= entry["sources"]
        return known

    def own_file(self, name: str) -> Path | None:
        """File of the caller's in the unfinished output, for what a resume goes on from; None where nothing is kept."""
        return self.partial / name

    def record(self, part: int) -> Any:
        """The record of a finished part; None of one that is not."""
        return self.done[part]["record"] if part in self.done else None

    def read(self, part: int) -> dict[str, Tensor]:
        """The tensors of a finished part, as `headers.load_stored`."""
        return load_stored({name: self.plan.tensors[name] for name in self.plan.parts[part]})

    def write(
        self,
        part: int,
        tensors: dict[str, Tensor],
        record: Any = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """Have one part written and entered in the journal; waits until fewer than `in_flight` are under way.

        tensors: by full name, with the plan's shapes and types, of any strides, on the CPU or one CUDA device, where
        their values may still be in the making on the current stream. They and `record` must not change any more; the
        tensors are kept until they are written. ValueError: other tensors than planned. OSError: an earlier part's.
        """
        self._wait(self.in_flight - 1)
        planned = {name: self.plan.tensors[name] for name in self.plan.parts[part]}
        for name in sorted(planned.keys() | tensors.keys()):
            asked = (planned[name].shape, planned[name].dtype) if name in planned else None
            given = (tuple(tensors[name].shape), tensors[name].dtype) if name in tensors else None
            if asked != given:
                raise ValueError(f"part {part}: tensor {name} is {given}, but {asked} was planned")
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pending.append(self._threads.submit(self._write, part, dict(tensors), record, dict(sources or {})))

    def flush(self) -> None:
        """Wait until every part given so far counts; raises what kept it from that."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        """Until no more than `left` parts are under way, the oldest first."""
        start = perf_counter()
        try:
            while len(self._pending) > left:
                self._pending.popleft().result()
        finally:
            self.wait_seconds += perf_counter() - start

    def _write(self, part: int, tensors: dict[str, Tensor], record: Any, sources: Digests) -> None:
        tensor_bytes = sum(t.nbytes for t in tensors.values())
        entry = {
            "part": part,
            "checksums": write_tensors(self.plan.tensors, tensors, self._stream),
            "tensor_bytes": tensor_bytes,
            "sources": sources,
            "record": record,
        }
        with self._journal_lock:
            append_to_journal(self.partial / JOURNAL, entry)
            self.done[part] = entry
            self.bytes_written += tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors in the parts that count."""
        return sum(entry["tensor_bytes"] for entry in self.done.values())

    def write_index(self) -> None:
        """Write the index of several files; now the partial folder loads, given a config.json beside it."""
        self.flush()
        missing = [part for part in range(len(self.plan.parts)) if part not in self.done]
        if missing:
            raise RuntimeError(f"parts {missing} were never written")
        if len(self.plan.headers) > 1:
            weight_map = {name: place.file.name for name, place in self.plan.tensors.items()}
            index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")

    def checksums(self) -> dict[str, Digests]:
        """By file, the digests that its tensors had in memory when they were written."""
        digests = {name: digest for entry in self.done.values() for name, digest in entry["checksums"].items()}
        found: dict[str, Digests] = {file.name: {} for file in self.plan.headers}
        for name, place in self.plan.tensors.items():
            found[place.file.name][name] = digests[name]
        return found

    def prove(self) -> dict[str, StoredTensor]:
        """Read everything back from the files, and return where each tensor is.

        Raises:
            VerificationError: a tensor is missing, or is not what was in memory when it was written.
        """
        self.flush()
        return prove_files(self.partial, self.checksums())

    def finish(self) -> None:
        """Make the partial folder the output; every other file must be in it by now."""
        self.flush()
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink()
        sync_tree(self.partial)
        try:
            # The journal goes last: a run killed between the two lines has a whole output with one file too many.
            self.partial.rename(self.output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise InputError(
                    f"{self.output}: came into being meanwhile; {self.partial} holds the whole result: move that one "
                    "away, and repeat with --resume"
                ) from error
            raise
        sync(self.output.parent)
        (self.output / JOURNAL).unlink()


def sync(folder: Path) -> None:
    """Bring the names in a folder, or the contents of a file, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring everything in a folder to the disk: files first, then the folders that name them."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))
