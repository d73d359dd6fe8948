"""128-bit digests of tensors, of those that are read and of those that are written.

A digest is XXH3-128 over the XXH3-128 digests of the tensor's pieces of LEAF_BYTES, so that pieces may be read by
several threads in any order. It finds what disks, copies and edits do; it does not resist an attacker.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from torch import Tensor

from ..errors import InputError, VerificationError
from ..runtime.faults import is_limit
from ..runtime.files import reason_of
from .headers import StoredTensor, read_header

LEAF_BYTES = 1 << 20
_READERS = 4

Digests = dict[str, str]  # by tensor, in hex
FileStates = dict[str, list[int]]  # by file name: size, time of the last change in ns, inode


class Digest:
    """The digest of bytes that come in order, in parts of any size."""

    def __init__(self) -> None:
        self._leaves, self._leaf, self._filled = xxhash.xxh3_128(), xxhash.xxh3_128(), 0

    def update(self, part: memoryview) -> None:
        while part:
            taken = part[: LEAF_BYTES - self._filled]
            self._leaf.update(taken)
            self._filled += len(taken)
            part = part[len(taken) :]
            if self._filled == LEAF_BYTES:
                self._end_leaf()

    def _end_leaf(self) -> None:
        self._leaves.update(self._leaf.digest())
        self._leaf, self._filled = xxhash.xxh3_128(), 0

    def hex(self) -> str:
        if self._filled:
            self._end_leaf()
        return self._leaves.hexdigest()


def leaf_digests(part: memoryview) -> bytes:
    """The digests of the pieces of `part`, which begins where a piece of its tensor does."""
    pieces = range(0, len(part), LEAF_BYTES)
    return b"".join(xxhash.xxh3_128_digest(part[begin : begin + LEAF_BYTES]) for begin in pieces)


def joined(leaves: Iterable[bytes]) -> str:
    """The digest of a tensor from what `leaf_digests` gave for its parts, in their order."""
    return xxhash.xxh3_128_hexdigest(b"".join(leaves))


def digest_of(tensor: Tensor) -> str:
    """The digest of a contiguous tensor on the CPU."""
    digest = Digest()
    if tensor.numel():
        digest.update(memory_of(tensor))
    return digest.hex()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def digests_of_files(tensors: Mapping[str, StoredTensor]) -> Digests:
    """Digests of tensors as their files hold them. OSError, with the file's name, where one cannot be read."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="digest") as threads:
        return dict(zip(tensors, threads.map(_digest_of_stored, tensors.values()), strict=True))


def _digest_of_stored(stored: StoredTensor) -> str:
    digest, buffer = Digest(), memoryview(bytearray(min(stored.bytes, 4 * LEAF_BYTES)))
    with stored.file.open("rb", buffering=0) as f:
        f.seek(stored.offset)
        left = stored.bytes
        while left:
            count = f.readinto(buffer[:left])
            if not count:
                return "cut short"  # no digest is this
            digest.update(buffer[:count])
            left -= count
    return digest.hex()


def prove_files(folder: Path, checksums: Mapping[str, Digests]) -> dict[str, StoredTensor]:
    """The tensors of a folder's files, by name, whose digests are these, by file.

    Raises:
        VerificationError: one is missing, or another.
        OSError: a limit of the system keeps this process from reading them.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, digests in checksums.items():
        try:
            stored = read_header(folder / name)
            found = digests_of_files(stored)
        except (InputError, OSError) as error:
            if is_limit(error):
                raise
            raise VerificationError(f"{folder / name}: not what was written: {reason_of(error)}") from error
        damaged = next((n for n in sorted(found.keys() | digests) if found.get(n) != digests.get(n)), None)
        if damaged is not None:
            raise VerificationError(f"{folder / name}: tensor {damaged} is not what was written")
        tensors |= stored
    return tensors


def file_states(files: Iterable[Path]) -> FileStates:
    """Size, time and inode of files: as long as they stay, what was read once need not be read again."""
    states = {}
    for file in sorted(set(files)):
        state = os.stat(file)
        states[file.name] = [state.st_size, state.st_mtime_ns, state.st_ino]
    return states


class Content:
    """Digests of what a run has read of a checkpoint, compared with those of earlier reads.

    `digests` holds what was read, by full name. origin: the checkpoint in messages.
    """

    def __init__(self, origin: object) -> None:
        self.origin = origin
        self.digests: Digests = {}
        self._expected: dict[str, tuple[str, str]] = {}

    def expect(self, digests: Mapping[str, str], origin: str) -> None:
        """Require from now on that these tensors are those that `origin`, a file or folder, was made from.

        Raises:
            InputError: one that was read already is another.
        """
        for name, digest in digests.items():
            if self.digests.get(name, digest) != digest:
                raise self._changed(name, origin)
            self._expected[name] = digest, origin

    def saw(self, name: str, digest: str) -> None:
        """A tensor was read.

        Raises:
            InputError: it is another than before.
        """
        expected, origin = self._expected.get(name, (digest, ""))
        if digest != expected:
            raise self._changed(name, origin)
        if self.digests.setdefault(name, digest) != digest:
            raise InputError(f"{self.origin}: tensor {name} changed while it was read; repeat when it rests")

    def _changed(self, name: str, origin: str) -> InputError:
        return InputError(
            f"{self.origin}: the checkpoint has changed: tensor {name} is not the one that {origin} was made from; "
            "delete that to start anew, or bring the old checkpoint back"
        )
