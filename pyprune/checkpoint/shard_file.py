"""Writes one safetensors file piece by piece, from tensors in host or device memory."""

import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .content import Digest, Digests, memory_of
from .host_buffer import HostBuffer

# safetensors' own order: wide types first, so that every tensor is aligned without gaps; then by name.
STORED = {torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
_RANK = {dtype: rank for rank, dtype in enumerate(STORED)}
# Bytes of a device tensor that travel at once. A few MiB saturate PCIe; two buffers of it are pinned.
PIECE_BYTES = 16 << 20


def write_shard(file: Path, tensors: dict[str, Tensor], stream: torch.cuda.Stream | None = None) -> tuple[int, Digests]:
    """Write tensors of the types in STORED, of any shape, strides and device.

    Returns the file's bytes, and the digest of every tensor: of what was in memory when it was written.

    `tensors` is emptied as they are written. `stream` copies CUDA tensors of its device; it must have been told to wait
    for their values. The bytes, those that safetensors' save_file would write, have reached the disk on return.

    Contiguous CPU tensors are written from where they are, others in pieces of 16 MiB through two buffers, so that one
    is filled while the other is written. OSError, with the file's name, if the system refuses; then no half file stays.
    """
    order = sorted(tensors, key=lambda name: (_RANK[tensors[name].dtype], name))
    digests = {name: Digest() for name in order}
    file.unlink(missing_ok=True)  # of a killed run: it may have other permissions
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            position = _write(descriptor, memoryview(_header(tensors, order)), 0)
            with ThreadPoolExecutor(1, thread_name_prefix="digest") as hashing:
                for name, part in _host_bytes(((name, tensors.pop(name).detach()) for name in order), stream):
                    hashed = hashing.submit(digests[name].update, part)  # while the system takes the bytes
                    position = _write(descriptor, part, position)
                    hashed.result()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        file.unlink(missing_ok=True)  # on a full disk the rest of the run may still need that space
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        if stream is not None:
            stream.synchronize()  # after an error a copy may still read a tensor, which is freed from here on
    return position, {name: digest.hex() for name, digest in digests.items()}


def _header(tensors: dict[str, Tensor], order: list[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        offsets = [position, position + tensor.nbytes]
        entries[name] = {"dtype": STORED[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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
