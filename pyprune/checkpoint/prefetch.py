"""Decoder layers in order on a device: the next one is read while the caller works on the present one."""

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from . import content
from .chunk_reader import Chunk, ChunkReader
from .headers import StoredTensor
from .loaded_model import LoadedLayers, LoadedModel
from .reader import CheckpointReader
from .source import ModelSource

# For a CPU the bytes only pass through on their way into the page cache: buffers that stay in a core's own cache.
_PASSING_BYTES = 1 << 20


@dataclass
class _Ahead:
    """A layer that is being read, in pieces by the full name of their tensor, in order within each.

    `tensors`, where it is copied to, is None where it stays in mapped files.
    """

    layer: int
    reads: list[tuple[str, Future[bytes]]]
    advice: list[Future[None]]
    stored: dict[str, StoredTensor]
    tensors: dict[str, Tensor] | None


class LayerPrefetcher:
    """Reads every decoder layer once, one ahead of the caller.

    For a CUDA device `threads` threads read `chunk_bytes` at a time into pinned memory (2 · threads · chunk_bytes) and
    copy to the device on a stream of their own. For a CPU the tensors are views of the mapped files, which one
    thread reads beforehand: this process's own memory does not grow, and a file that cannot be read is an error rather
    than the end of the process.

    Every tensor's digest is entered in the reader's `content`. chunk_bytes: a multiple of content.LEAF_BYTES.

    `bytes_read` counts the bytes of the layers handed over, `wait_seconds` how long the caller waited for them.
    """

    def __init__(
        self, reader: CheckpointReader, device: torch.device, threads: int = 8, chunk_bytes: int = 16 << 20
    ) -> None:
        if chunk_bytes % content.LEAF_BYTES:
            raise ValueError(f"chunks of {chunk_bytes} bytes: a multiple of {content.LEAF_BYTES} is needed")
        self.reader, self.device = reader, device
        self.threads, self.chunk_bytes = threads, chunk_bytes
        self.bytes_read = 0
        self.wait_seconds = 0.0
        self._mapped = device.type == "cpu"

    def layers(self, first: int = 0, stop: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The tensors of layers first, first + 1, … up to `stop` (all), named and typed as `read_layer` gives them.

        Two layers are in memory at most, so a dictionary is emptied when the next is asked for: take out of it what you
        need for longer. On CUDA, what the current stream does from then on sees the values; the host waits for the
        files, never for that stream.

        OSError, with the file and the tensor, if a file cannot be read or has become shorter since its header was read.
        InputError: a tensor is another than when it was read before.
        """
        stop = self.reader.layers if stop is None else stop
        if not 0 <= first <= stop <= self.reader.layers:
            raise ValueError(f"layers {first} to {stop} of {self.reader.layers}")
        if first == stop:
            return
        threads, chunk_bytes = (1, _PASSING_BYTES) if self._mapped else (self.threads, self.chunk_bytes)
        with ChunkReader(self.device, threads, chunk_bytes) as chunks:
            ahead = self._start(chunks, first)
            for layer in range(first, stop):
                start = perf_counter()
                tensors = self._finish(chunks, ahead)
                self.wait_seconds += perf_counter() - start
                self.bytes_read += sum(t.nbytes for t in tensors.values())
                if layer + 1 < stop:
                    ahead = self._start(chunks, layer + 1)
                yield tensors
                tensors.clear()

    def _start(self, chunks: ChunkReader, layer: int) -> _Ahead:
        """Begin to read a layer; on CUDA its memory is taken on the caller's stream, from what is free by its end."""
        stored = self.reader.layer_tensors(layer)
        if self._mapped:
            advice = chunks.advise(self._chunks(layer, stored, {}, sys.maxsize))
            return _Ahead(layer, self._read(chunks, layer, stored, {}), advice, stored, None)
        tensors = {name: torch.empty(s.shape, dtype=s.dtype, device=self.device) for name, s in stored.items()}
        if chunks.stream is not None:
            chunks.own(torch.cuda.current_stream(self.device))
        return _Ahead(layer, self._read(chunks, layer, stored, tensors), [], stored, tensors)

    def _read(
        self, chunks: ChunkReader, layer: int, stored: dict[str, StoredTensor], targets: dict[str, Tensor]
    ) -> list[tuple[str, Future[bytes]]]:
        pieces = self._chunks(layer, stored, targets, chunks.chunk_bytes)
        return [(piece.name, read) for piece, read in zip(pieces, chunks.read(pieces), strict=True)]

    def _finish(self, chunks: ChunkReader, ahead: _Ahead) -> dict[str, Tensor]:
        """Wait for the files, and have the caller's stream wait for the copies."""
        for advice in ahead.advice:
            advice.result()
        leaves: dict[str, list[bytes]] = {self.reader.layer_prefix(ahead.layer) + name: [] for name in ahead.stored}
        for name, read in ahead.reads:
            leaves[name].append(read.result())
        for name, own in leaves.items():
            self.reader.content.saw(name, content.joined(own))
        if ahead.tensors is None:
            return self.reader.read_layer(ahead.layer)
        if chunks.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(chunks.stream)
            for tensor in ahead.tensors.values():
                tensor.record_stream(current)  # matters only if it is another stream than that of `_start`
        return ahead.tensors

    def _chunks(
        self, layer: int, stored: dict[str, StoredTensor], targets: dict[str, Tensor], chunk_bytes: int
    ) -> list[Chunk]:
        """The layer in pieces, in the files' order."""
        prefix = self.reader.layer_prefix(layer)
        chunks: list[Chunk] = []
        for name, place in sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset)):
            target = targets[name].view(-1).view(torch.uint8) if targets else None
            for begin in range(0, place.bytes, chunk_bytes):
                size = min(chunk_bytes, place.bytes - begin)
                part = None if target is None else target[begin : begin + size]
                chunks.append(Chunk(prefix + name, place.file, place.offset + begin, size, part))
        return chunks


def layer_loader(source: ModelSource, device: torch.device) -> LayerPrefetcher | LoadedLayers:
    """Return what yields the decoder layers of a source in order on a device."""
    if isinstance(source, CheckpointReader):
        return LayerPrefetcher(source, device)
    assert isinstance(source, LoadedModel)
    return LoadedLayers(source, device)
