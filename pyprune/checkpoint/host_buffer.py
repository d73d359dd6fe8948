"""Host memory through which bytes travel between a file and a device."""

import torch
from torch import Tensor


class HostBuffer:
    """`size` bytes of host memory, pinned for a CUDA device, and the moment from which they are free again.

    `bytes` is uint8 [size], `view` the same memory for the operating system. Copies go through `stream`, a stream of
    the CUDA device, and return at once; with None, for a CPU, they are done when they return.
    """

    def __init__(self, size: int, stream: torch.cuda.Stream | None) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=stream is not None)
        self.view = self.bytes.numpy().data
        self._stream = stream
        # blocking: a thread that waits for it sleeps rather than spins, several may
        self._copied = None if stream is None else torch.cuda.Event(blocking=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target ← source, one of them in this buffer; the buffer is busy until `wait` returns."""
        if self._stream is None or self._copied is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._copied.record(self._stream)

    def wait(self) -> None:
        """Return once the last copy is done; at once if there was none."""
        if self._copied is not None:
            self._copied.synchronize()
