"""Writes a checkpoint whole or not at all: one shard a layer into OUTPUT.partial, a journal, one final rename."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from .reader import INDEX

JOURNAL = "journal.jsonl"


class CheckpointWriter:
    """Collects shards in `<output>.partial`; `finish` makes them `<output>` by a rename.

    journal.jsonl holds one JSON document a line: first `{"identity": ...}`, what the run depends on; then one
    line for each finished shard, `{"shard": k, "file": name, "tensors": [...], "bytes": n, "record": ...}`.
    A shard counts once its line is there, which is after its bytes reached the disk. `record` is whatever the
    caller wants back on resume.
    """

    def __init__(self, output: Path, shards: int, identity: dict[str, Any], resume: bool) -> None:
        self.output = output = output.resolve()
        self.partial = output.with_name(output.name + ".partial")
        self.shards = shards
        self.done: dict[int, dict[str, Any]] = {}
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

    def discard(self) -> None:
        """Remove what was written: the input cannot be pruned, so there is nothing to resume."""
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
        """File of a shard, 0-based, in the numbering that transformers uses."""
        return self.partial / f"model-{shard + 1:05d}-of-{self.shards:05d}.safetensors"

    def record(self, shard: int) -> Any:
        """The record of a finished shard; None of one that is not."""
        return self.done[shard]["record"] if shard in self.done else None

    def write(self, shard: int, tensors: dict[str, Tensor], record: Any = None) -> None:
        """Write one shard (full tensor names, CPU tensors) and enter it in the journal."""
        file = self.file(shard)
        temporary = file.with_suffix(".tmp")
        save_tensors({k: v.contiguous() for k, v in tensors.items()}, temporary, {"format": "pt"})
        # safetensors makes files that only their owner reads; a checkpoint gets what the umask allows.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(file)
        entry = {
            "shard": shard,
            "file": file.name,
            "tensors": list(tensors),
            "tensor_bytes": sum(t.nbytes for t in tensors.values()),
            "bytes": file.stat().st_size,
            "record": record,
        }
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.done[shard] = entry

    @property
    def tensor_bytes(self) -> int:
        return sum(entry["tensor_bytes"] for entry in self.done.values())

    def write_index(self) -> None:
        """Write the index, after which the partial folder loads, given a config.json beside it."""
        missing = [k for k in range(self.shards) if k not in self.done]
        if missing:
            raise RuntimeError(f"shards {missing} were never written")
        weight_map = {
            name: self.done[shard]["file"] for shard in range(self.shards) for name in self.done[shard]["tensors"]
        }
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        (self.partial / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")

    def finish(self) -> None:
        """Make the partial folder the output; every other file must be in it by now."""
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink()
        directory = os.open(self.partial, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        # The journal goes last: a run killed between the two lines has a whole output with one file too many.
        self.partial.rename(self.output)
        (self.output / JOURNAL).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """safetensors' save_file, with a full disk raised as the OSError that it is."""
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        if "os error 28" in str(error):  # ENOSPC; safetensors hands the number on in its text only
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
        raise


def save_cached(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a file of a cache, whole or not at all; two runs may write the same one at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_tensors(tensors, temporary, metadata)
    temporary.replace(file)


def digest(identity: dict[str, Any]) -> str:
    """A file name's worth of everything that a file's contents follow from."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which entries of two identities differ, for people; empty if none does."""
    return "; ".join(
        f"{key} (was {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def check_free(output: Path) -> None:
    """Refuse an output that exists and holds anything, or a place where none can be made by a rename."""
    if output.exists():
        if not output.is_dir() or any(output.iterdir()):
            raise InputError(f"{output}: exists and is not an empty folder; name another output")
        if output.is_mount() or output.samefile(Path.cwd()):
            raise InputError(f"{output}: cannot be replaced; name a new folder inside it")
    check_place(output)


def check_place(path: Path) -> None:
    """Refuse a path that cannot be made: nothing above it is a folder that can be written."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot be made, {parent} is not a folder that can be written")
    if len(path.name.encode()) > 200:  # .partial is appended, and file systems end at 255 bytes
        raise InputError(f"{path.name[:40]}...: too long a name; file systems end at 255 bytes")


def check_space(output: Path, needed: int) -> None:
    """Refuse a run whose output will not fit: better before the first layer than in the last."""
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{parent}: {free / 1e6:.1f} MB free, the output needs {needed / 1e6:.1f} MB; free some space")
