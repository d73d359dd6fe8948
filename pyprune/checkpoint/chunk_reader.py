"""Reads pieces of files in threads, through host buffers, to where they belong."""

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from .content import leaf_digests
from .host_buffer import HostBuffer


@dataclass(frozen=True)
class Chunk:
    """Bytes [offset, offset + size) of a file, part of the tensor `name`; `target`, uint8 [size], is where they go.

    Without a target they are only read, and so are in the system's memory afterwards.
    """

    name: str
    file: Path
    offset: int
    size: int
    target: Tensor | None


class ChunkReader:
    """`threads` threads with two buffers of `chunk_bytes` each: one is copied from while the other is filled.

    device: of the targets. On CUDA the buffers are pinned, and copies run on `stream`. It is a context: on leaving,
    what is queued is dropped, what runs is waited for, and the memory of targets may be used again.
    """

    def __init__(self, device: torch.device, threads: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._owner: torch.cuda.Stream | None = None
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="layer")
        self._descriptors: dict[Path, int] = {}
        # A buffer is made by the thread that first needs it: pinning takes time.
        self._buffers: SimpleQueue[HostBuffer | None] = SimpleQueue()
        for _ in range(2 * threads):
            self._buffers.put(None)

    def __enter__(self) -> "ChunkReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        if self.stream is not None and self._owner is not None:
            self._owner.wait_stream(self.stream)

    def own(self, owner: torch.cuda.Stream) -> None:
        """Copies from now on wait for what is queued on `owner`, the stream that their targets were allocated on:
        until then the memory may be in use.
        """
        assert self.stream is not None
        self.stream.wait_stream(owner)
        self._owner = owner

    def read(self, chunks: list[Chunk]) -> list[Future[bytes]]:
        """Start reading; a future is done when the bytes are read and, where there is a target, their copy is queued.

        Its result is the digests of the chunk's pieces (`leaf_digests`), its error an OSError that names the file and
        the tensor. OSError at once if a file cannot be opened.
        """
        descriptors = [self._open(chunk) for chunk in chunks]
        return [self._threads.submit(self._read, *each) for each in zip(descriptors, chunks, strict=True)]

    def advise(self, chunks: list[Chunk]) -> list[Future[None]]:
        """Have the system start on all of it before `read`: more requests reach the disk than come one by one."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return []
        # In a thread, since the system makes the caller wait when it has taken on too much.
        return [
            self._threads.submit(os.posix_fadvise, self._open(c), c.offset, c.size, os.POSIX_FADV_WILLNEED)
            for c in chunks
        ]

    def _open(self, chunk: Chunk) -> int:
        if chunk.file not in self._descriptors:
            self._descriptors[chunk.file] = os.open(chunk.file, os.O_RDONLY)
        return self._descriptors[chunk.file]

    def _read(self, descriptor: int, chunk: Chunk) -> bytes:
        buffer = self._buffers.get()
        try:
            buffer = buffer or HostBuffer(self.chunk_bytes, self.stream)
            buffer.wait()
            _read_exactly(descriptor, chunk, buffer.view)
            if chunk.target is not None:
                buffer.copy(chunk.target, buffer.bytes[: chunk.size])
            return leaf_digests(buffer.view[: chunk.size])  # while the copy is under way
        finally:
            self._buffers.put(buffer)


def _read_exactly(descriptor: int, chunk: Chunk, view: memoryview) -> None:
    """Fill view[:chunk.size]. The system may give less than it is asked for, and nothing at the file's end."""
    done = 0
    while done < chunk.size:
        try:
            count = os.preadv(descriptor, [view[done : chunk.size]], chunk.offset + done)
        except OSError as error:
            raise OSError(error.errno, f"tensor {chunk.name}: {error.strerror}", str(chunk.file)) from error
        if count == 0:
            size = os.fstat(descriptor).st_size
            reason = (
                f"tensor {chunk.name} goes on to byte {chunk.offset + chunk.size}, the file ends at {size}: cut short"
            )
            raise OSError(errno.EIO, f"{reason} since it was opened", str(chunk.file))
        done += count
