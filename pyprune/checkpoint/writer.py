"""Writes a checkpoint whole or not at all: one shard a layer into OUTPUT.partial, a journal, one final rename."""

import errno
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, VerificationError
from .content import Digests, digests_of_files
from .headers import INDEX, StoredTensor, read_headers
from .journal import JOURNAL, journal_line, read_journal
from .ownership import FolderLock
from .preflight import check_output_free
from .shard_file import STORED, write_shard

logger = logging.getLogger(__name__)
# Of a shard's line, what is read of it again.
_ENTRY = {
    "shard": int,
    "file": str,
    "checksums": dict,
    "tensor_bytes": int,
    "bytes": int,
    "sources": dict,
    "record": object,
}
MORE = "model-more.safetensors"  # tensors that only the end of a run knows of


class CheckpointWriter:
    """Collects shards in `<output>.partial`; `finish` makes them `<output>` by a rename.

    journal.jsonl holds one JSON document a line: first `{"identity": ..., "source": ...}`, what the run depends on;
    then one line for each finished shard, `{"shard": k, "file": name, "checksums": {tensor: digest}, "bytes": n,
    "sources": {tensor: digest}, "record": ...}`. A shard counts once its line is there, which is after its bytes
    reached the disk, and on a resume if they still have the digests that they had in memory. `record` is whatever the
    caller wants back on resume, `sources` the digests of the tensors that the shard was made from.

    Shards are written by threads, `in_flight` at a time, while the caller goes on; `done` holds those that count. An
    error of a thread is raised by a later `write`, or by `flush`, `write_index` or `finish`; its shard is then not in
    the journal. `bytes_written` counts the shards' bytes, `wait_seconds` how long the caller had to wait for a thread.

    One process at a time works in the partial folder: InputError for the others.
    """

    MOST_IN_FLIGHT = 2  # one is copied and handed to the system while the other is brought to the disk

    def __init__(
        self, output: Path, shards: int, identity: dict[str, Any], resume: bool, source: dict[str, Any] | None = None
    ) -> None:
        self.output = output = output.resolve()
        self.partial = partial_of(output)
        self.shards = shards
        self.done: dict[int, dict[str, Any]] = {}
        self.bytes_written = 0
        self.wait_seconds = 0.0
        self.in_flight = 1
        self._threads = ThreadPoolExecutor(self.MOST_IN_FLIGHT, thread_name_prefix="shard")
        self._pending: deque[Future[None]] = deque()
        self._journal_lock = Lock()
        self._stream: torch.cuda.Stream | None = None
        self._lock: FolderLock | None = None
        check_output_free(output)
        if self.partial.exists() and not resume:
            raise InputError(f"{self.partial}: an unfinished run; add --resume to finish it, or delete that folder")
        if self.partial.exists() and not self.partial.is_dir():
            raise InputError(f"{self.partial}: is in the way; move that file, or name another output")
        self.head: dict[str, Any] = {"identity": identity, "source": source or {}}
        if self.partial.exists():
            self._lock = FolderLock(self.partial)
            try:
                self._restore(identity)
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
        journal = self.partial / JOURNAL
        temporary = journal.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as f:
            f.writelines(journal_line(document) for document in [self.head, *self.done.values()])
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(journal)

    def settle(self) -> None:
        """Let the threads finish the shards that they are at: `done` is final, and nothing more can be written.

        No error is raised: a resume writes those shards again.
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

    def _restore(self, identity: dict[str, Any]) -> None:
        journal = self.partial / JOURNAL
        if not journal.exists() and any(file.suffix != ".tmp" for file in self.partial.iterdir()):
            raise InputError(
                f"{self.partial}: not an unfinished run of pyprune: no {JOURNAL} there; delete that folder"
            )
        first, *entries = (read_journal(journal) if journal.exists() else []) or [self.head]
        try:
            changed = describe_changes(first["identity"], identity)
            if changed:
                raise InputError(
                    f"{self.partial}: cannot resume with other settings: {changed}; "
                    "repeat the first command, or delete that folder"
                )
            for entry in entries:
                if any(not isinstance(entry[name], kind) for name, kind in _ENTRY.items()):
                    raise TypeError(f"an entry has other types than {sorted(_ENTRY)}")
                if self._intact(entry):
                    self.done[entry["shard"]] = entry
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{journal}: not a journal of pyprune ({error!r}); delete {self.partial}") from error
        self.head = first

    def _intact(self, entry: dict[str, Any]) -> bool:
        """Whether a shard is there, with the digests that its tensors had in memory."""
        file = self.partial / entry["file"]
        if file != self.file(entry["shard"]) or not file.is_file() or file.stat().st_size != entry["bytes"]:
            return False
        try:
            damaged = damaged_tensor([file], entry["checksums"])
        except (InputError, OSError) as error:
            damaged = str(error)
        if damaged is not None:
            logger.warning("%s: damaged since it was written (%s); it is made anew", file, damaged)
        return damaged is None

    def sources(self) -> Digests:
        """Digests of the tensors that the shards which count were made from."""
        known: Digests = dict(self.head.get("source", {}).get("digests", {}))
        for entry in self.done.values():
            known |= entry["sources"]
        return known

    def own_file(self, name: str) -> Path | None:
        """File of the caller's in the unfinished output, for what a resume goes on from; None where nothing is kept."""
        return self.partial / name

    def file(self, shard: int) -> Path:
        """File of a shard, 0-based, in the numbering that transformers uses; shard `shards` is one more, by name."""
        if shard == self.shards:
            return self.partial / MORE
        return self.partial / f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"

    def record(self, shard: int) -> Any:
        """The record of a finished shard; None of one that is not."""
        return self.done[shard]["record"] if shard in self.done else None

    def write(
        self,
        shard: int,
        tensors: dict[str, Tensor],
        record: Any = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """Have one shard written and entered in the journal; waits until fewer than `in_flight` are under way.

        tensors: by full name, of a type in STORED, any shape and strides, on the CPU or one CUDA device, where
        their values may still be in the making on the current stream. They and `record` must not change any more; the
        tensors are kept until they are written. ValueError: another type. OSError: an earlier shard's.
        """
        self._wait(self.in_flight - 1)
        for name, tensor in tensors.items():
            if tensor.dtype not in STORED:
                raise ValueError(f"tensor {name} is {tensor.dtype}; float32, bfloat16, float16 or int32 is needed")
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is not None:
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pending.append(self._threads.submit(self._write, shard, dict(tensors), record, dict(sources or {})))

    def flush(self) -> None:
        """Wait until every shard given so far counts; raises what kept it from that."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        """Until no more than `left` shards are under way, the oldest first."""
        start = perf_counter()
        try:
            while len(self._pending) > left:
                self._pending.popleft().result()
        finally:
            self.wait_seconds += perf_counter() - start

    def _write(self, shard: int, tensors: dict[str, Tensor], record: Any, sources: Digests) -> None:
        file = self.file(shard)
        tensor_bytes = sum(t.nbytes for t in tensors.values())
        temporary = file.with_suffix(".tmp")
        size, checksums = write_shard(temporary, tensors, self._stream)
        temporary.replace(file)
        sync(self.partial)
        entry = {
            "shard": shard,
            "file": file.name,
            "checksums": checksums,
            "tensor_bytes": tensor_bytes,
            "bytes": size,
            "sources": sources,
            "record": record,
        }
        with self._journal_lock:
            self._enter(journal_line(entry))
            self.done[shard] = entry
            self.bytes_written += size

    def _enter(self, line: str) -> None:
        journal = self.partial / JOURNAL
        with journal.open("ab", buffering=0) as f:
            before = f.tell()
            rest = memoryview(line.encode())
            try:
                while rest:
                    rest = rest[f.write(rest) :]
                os.fsync(f.fileno())
            except OSError as error:
                f.truncate(before)  # half a line would spoil the one that follows it
                raise OSError(error.errno, error.strerror, str(journal)) from error

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors in the shards that count."""
        return sum(entry["tensor_bytes"] for entry in self.done.values())

    def write_index(self) -> None:
        """Write the index, after which the partial folder loads, given a config.json beside it."""
        self.flush()
        missing = [k for k in range(self.shards) if k not in self.done]
        if missing:
            raise RuntimeError(f"shards {missing} were never written")
        weight_map = {
            name: self.done[shard]["file"] for shard in sorted(self.done) for name in self.done[shard]["checksums"]
        }
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        (self.partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")

    def checksums(self) -> dict[str, Digests]:
        """By file, the digests that its tensors had in memory when they were written."""
        return {self.done[shard]["file"]: self.done[shard]["checksums"] for shard in sorted(self.done)}

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


def prove_files(folder: Path, checksums: Mapping[str, Digests]) -> dict[str, StoredTensor]:
    """The tensors of a folder's files, by name, whose digests are these, by file.

    Raises:
        VerificationError: one is missing, or another.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, digests in checksums.items():
        try:
            damaged = damaged_tensor([folder / file], digests)
            tensors |= read_headers([folder / file])
        except (InputError, OSError) as error:
            raise VerificationError(f"{folder / file}: not what was written: {error}") from error
        if damaged is not None:
            raise VerificationError(f"{folder / file}: tensor {damaged} is not what was written")
    return tensors


def damaged_tensor(files: list[Path], digests: Digests) -> str | None:
    """The first tensor of the files that has another digest, or is missing, or should not be there; or None."""
    stored = read_headers(files)
    found = digests_of_files(stored)
    return next((name for name in sorted(found.keys() | digests) if found.get(name) != digests.get(name)), None)


def partial_of(output: Path) -> Path:
    """The folder beside `output` in which it is made."""
    output = output.resolve()
    return output.with_name(output.name + ".partial")


def begun(output: Path) -> dict[str, Any]:
    """The first document of an unfinished run's journal, `identity` and `source`; empty where there is none."""
    journal = partial_of(output) / JOURNAL
    if not journal.exists():
        return {}
    first, *_ = [*read_journal(journal), {}]
    kinds = [first.get(name) for name in ("identity", "source")]
    return first if all(isinstance(kind, dict) for kind in kinds) else {}


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


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The entries of two identities that differ, each with both values, for people."""
    return {
        key: f"{key} (was {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the entries in which two identities differ; empty if there are none."""
    return "; ".join(changes(before, now).values())
