"""Writes tensors from host or device memory to their places in safetensors files."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .content import Digest, Digests, memory_of
from .headers import StoredTensor
from .host_buffer import HostBuffer

# Bytes of a device tensor that travel at once. A few MiB saturate PCIe; two buffers of it are pinned.
PIECE_BYTES = 16 << 20


def is_reserved(file: Path, header: bytes, size: int) -> bool:
    """Return whether a file begins with this header and has this size."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as f:
        return f.read(len(header)) == header


def reserve_shard(file: Path, header: bytes, size: int) -> None:
    """Make a file of `size` bytes that begins with the header; on return it has reached the disk.

    What follows the header takes no space before it is written. OSError, with the file's name, if the system refuses;
    then no file stays.
    """
    file.unlink(missing_ok=True)  # of a killed run: it may have other permissions
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(descriptor, size)
            _write(descriptor, memoryview(header), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_tensors(
    places: Mapping[str, StoredTensor], tensors: dict[str, Tensor], stream: torch.cuda.Stream | None = None
) -> Digests:
    """Write tensors of any strides and device to their places in files that are there.

    Returns the digest of every tensor: of what was in memory when it was written.

    `tensors` is emptied as they are written. `stream` copies CUDA tensors of its device; it must have been told to wait
    for their values. The bytes have reached the disk on return.

    Contiguous CPU tensors are written from where they are, others in pieces of 16 MiB through two buffers, so that one
    is filled while the other is written. OSError, with the file's name, if the system refuses.
    """
    order = sorted(tensors, key=lambda name: (places[name].file, places[name].offset))
    digests = {name: Digest() for name in order}
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as hashing, _Target() as target:
            for name, part in _host_bytes(((name, tensors.pop(name).detach()) for name in order), stream):
                hashed = hashing.submit(digests[name].update, part)  # while the system takes the bytes
                target.write(places[name], part)
                hashed.result()
            target.sync()
    finally:
        if stream is not None:
            stream.synchronize()  # after an error a copy may still read a tensor, which is freed from here on
    return {name: digest.hex() for name, digest in digests.items()}


class _Target:
    """The file that is written, one at a time, and the place in it."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._place: StoredTensor | None = None
        self._position = 0

    def __enter__(self) -> "_Target":
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, place: StoredTensor, part: memoryview) -> None:
        """Write the tensor's next bytes."""
        if self._place is not place:
            self._begin(place)
        assert self._descriptor is not None
        try:
            self._position = _write(self._descriptor, part, self._position)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place.file)) from error

    def _begin(self, place: StoredTensor) -> None:
        if self._place is None or self._place.file != place.file:
            self.sync()
            self._descriptor = os.open(place.file, os.O_WRONLY)
        self._place, self._position = place, place.offset

    def sync(self) -> None:
        """Bring the file to the disk, and close it."""
        if self._descriptor is None:
            return
        assert self._place is not None
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._place.file)) from error
        self.__exit__()


def _host_bytes(
    tensors: Iterator[tuple[str, Tensor]], stream: torch.cuda.Stream | None
) -> Iterator[tuple[str, memoryview]]:
    """The tensors' bytes in row-major order, with their tensor's name; each is valid until the next is asked for."""
    buffers: list[HostBuffer] = []
    # One part is on its way while the one before is written. It keeps its tensor, whose copy may not have begun.
    pending: tuple[str, tuple[memoryview, HostBuffer | None, Tensor]] | None = None
    for name, tensor in tensors:
        direct = tensor.device.type == "cpu" and tensor.is_contiguous()
        for piece in [tensor] if direct else _pieces(tensor, PIECE_BYTES):
            following = (memory_of(piece), None, piece) if direct else _staged(piece, buffers, stream)
            if pending is not None:
                yield pending[0], _arrived(pending[1])
            pending = name, following
    if pending is not None:
        yield pending[0], _arrived(pending[1])


def _arrived(part: tuple[memoryview, HostBuffer | None, Tensor]) -> memoryview:
    view, buffer, _ = part
    if buffer is not None:
        buffer.wait()
    return view


def _staged(
    piece: Tensor, buffers: list[HostBuffer], stream: torch.cuda.Stream | None
) -> tuple[memoryview, HostBuffer, Tensor]:
    """Copy a piece into the buffer that was used before the last one and is written by now."""
    buffer = buffers.pop(0) if len(buffers) == 2 else HostBuffer(PIECE_BYTES, stream)
    buffers.append(buffer)
    buffer.copy(buffer.bytes[: piece.nbytes].view(piece.dtype).view(piece.shape), piece)
    return buffer.view[: piece.nbytes], buffer, piece


def _pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Split a tensor into views of at most `limit` bytes each; end to end they are it in row-major order."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    if tensor.nbytes <= limit:
        yield tensor
    elif rows := limit // tensor[0].nbytes:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from _pieces(row, limit)


def _write(descriptor: int, part: memoryview, position: int) -> int:
    """Write all of it at the position; returns where it ends. The system may take less than it is given."""
    while part:
        written = os.pwrite(descriptor, part, position)
        position += written
        part = part[written:]
    return position
