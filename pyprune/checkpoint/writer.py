"""Writes a checkpoint whole or not at all: one shard a layer into OUTPUT.partial, a journal, one final rename."""

import json
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .places import check_free
from .reader import INDEX
from .shard_file import STORED, write_shard

JOURNAL = "journal.jsonl"
MORE = "model-more.safetensors"  # tensors that only the end of a run knows of


class CheckpointWriter:
    """Collects shards in `<output>.partial`; `finish` makes them `<output>` by a rename.

    journal.jsonl holds one JSON document a line: first `{"identity": ...}`, what the run depends on; then one
    line for each finished shard, `{"shard": k, "file": name, "tensors": [...], "bytes": n, "record": ...}`.
    A shard counts once its line is there, which is after its bytes reached the disk. `record` is whatever the
    caller wants back on resume.

    Shards are written by threads, `in_flight` at a time, while the caller goes on; `done` holds those that count. An
    error of a thread is raised by a later `write`, or by `flush`, `write_index` or `finish`; its shard is then not in
    the journal. `bytes_written` counts the shards' bytes, `wait_seconds` how long the caller had to wait for a thread.
    """

    MOST_IN_FLIGHT = 2  # one is copied and handed to the system while the other is brought to the disk

    def __init__(self, output: Path, shards: int, identity: dict[str, Any], resume: bool) -> None:
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
        check_free(output)
        journal = self.partial / JOURNAL
        if self.partial.exists() and not resume:
            raise InputError(f"{self.partial}: an unfinished run; add --resume to finish it, or delete that folder")
        if self.partial.exists() and not self.partial.is_dir():
            raise InputError(f"{self.partial}: is in the way; move that file, or name another output")
        self._lines: list[dict[str, Any]] = [{"identity": identity}]
        if journal.exists():
            self._restore(journal, identity)

    def begin(self) -> None:
        """Make the partial folder, or tidy the journal of the run that is resumed; until here nothing is written."""
        self.partial.mkdir(parents=True, exist_ok=True)
        journal = self.partial / JOURNAL
        temporary = journal.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in [*self._lines, *self.done.values()])
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(journal)

    def close(self) -> None:
        """End the threads after the shards that they are at. No error is raised: a resume writes those shards again."""
        self._threads.shutdown()

    def discard(self) -> None:
        """Remove what was written: the input cannot be pruned, so there is nothing to resume."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _restore(self, journal: Path, identity: dict[str, Any]) -> None:
        lines = journal.read_text(encoding="utf-8").split("\n")
        # What follows the last newline is a line that a killed run did not finish.
        try:
            first, *entries = [json.loads(line) for line in lines[:-1]] or [{"identity": identity}]
            first["identity"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{journal}: not a journal of pyprune ({error!r}); delete {self.partial}") from error
        changed = differences(first["identity"], identity)
        if changed:
            raise InputError(
                f"{self.partial}: cannot resume with other settings: {changed}; "
                "repeat the first command, or delete that folder"
            )
        for entry in entries:
            file = self.partial / entry["file"]
            if file.is_file() and file.stat().st_size == entry["bytes"]:
                self.done[entry["shard"]] = entry

    def file(self, shard: int) -> Path:
        """File of a shard, 0-based, in the numbering that transformers uses; shard `shards` is one more, by name."""
        if shard == self.shards:
            return self.partial / MORE
        return self.partial / f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"

    def record(self, shard: int) -> Any:
        """The record of a finished shard; None of one that is not."""
        return self.done[shard]["record"] if shard in self.done else None

    def write(self, shard: int, tensors: dict[str, Tensor], record: Any = None) -> None:
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
        self._pending.append(self._threads.submit(self._write, shard, dict(tensors), record))

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

    def _write(self, shard: int, tensors: dict[str, Tensor], record: Any) -> None:
        file = self.file(shard)
        entry = {
            "shard": shard,
            "file": file.name,
            "tensors": list(tensors),
            "tensor_bytes": sum(t.nbytes for t in tensors.values()),
        }
        temporary = file.with_suffix(".tmp")
        size = write_shard(temporary, tensors, self._stream)
        temporary.replace(file)
        _sync(self.partial)
        entry |= {"bytes": size, "record": record}
        with self._journal_lock:
            self._enter(json.dumps(entry) + "\n")
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
            name: self.done[shard]["file"] for shard in sorted(self.done) for name in self.done[shard]["tensors"]
        }
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        (self.partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")

    def finish(self) -> None:
        """Make the partial folder the output; every other file must be in it by now."""
        self.flush()
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink()
        _sync(self.partial)
        # The journal goes last: a run killed between the two lines has a whole output with one file too many.
        self.partial.rename(self.output)
        (self.output / JOURNAL).unlink()


def partial_of(output: Path) -> Path:
    """The folder beside `output` in which it is made."""
    output = output.resolve()
    return output.with_name(output.name + ".partial")


def begun_identity(output: Path) -> dict[str, Any]:
    """The identity in the journal of an unfinished run; empty where there is none that can be read."""
    journal = partial_of(output) / JOURNAL
    try:
        with journal.open(encoding="utf-8") as f:
            identity = json.loads(f.readline())["identity"]
    except (OSError, ValueError, KeyError, TypeError):  # the writer says what is wrong with it
        return {}
    return identity if isinstance(identity, dict) else {}


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which entries of two identities differ, for people; empty if none does."""
    return "; ".join(
        f"{key} (was {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )
