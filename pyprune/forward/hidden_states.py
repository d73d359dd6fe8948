"""Hidden states of all calibration windows, in micro-batches: on the device, or in host memory and copied ahead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch. value: [windows, tokens, hidden_size] on the device; write_back: puts a result in its place."""

    value: Tensor
    write_back: Callable[[Tensor], object]


class HiddenStates:
    """[windows, tokens, hidden_size] in one type, on `device` or in host memory, read and replaced part by part.

    In host memory (pinned where `device` is a GPU) the next part is copied to the device while the present one is
    worked on, and results are copied back beside the work that follows: two streams, two buffers of a
    part's size. A reader of `data` itself has to wait for the device first.
    """

    def __init__(self, data: Tensor, device: torch.device, batch: int) -> None:
        self.data, self.device, self.batch = data, device, batch
        self.on_device = data.device.type == device.type
        if not self.on_device:
            self.incoming, self.outgoing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @classmethod
    def empty(
        cls, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, batch: int, on_device: bool
    ) -> "HiddenStates":
        host = not on_device and device.type == "cuda"
        data = torch.empty(size, dtype=dtype, device="cpu" if host else device, pin_memory=host)
        return cls(data, device, batch)

    def copy(self, on_device: bool) -> "HiddenStates":
        """Return a copy."""
        windows, tokens, hidden_size = self.data.shape
        result = HiddenStates.empty((windows, tokens, hidden_size), self.data.dtype, self.device, self.batch, on_device)
        result.data.copy_(self.data)
        return result

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Every micro-batch in order; one that is replaced may be read again only in another round."""
        slices = self.data.split(self.batch)
        if self.on_device:
            for part in slices:
                yield MicroBatch(part, part.copy_)
            return
        current = torch.cuda.current_stream(self.device)
        buffers = [torch.empty_like(slices[0], device=self.device, pin_memory=False) for _ in slices[:2]]
        self.incoming.wait_stream(self.outgoing)  # what the last round replaced
        values, arrivals = [], []

        def fetch(k: int) -> None:
            value = buffers[k % 2][: len(slices[k])]
            self.incoming.wait_stream(current)  # the part that was in this buffer is through
            with torch.cuda.stream(self.incoming):
                value.copy_(slices[k], non_blocking=True)
                arrivals.append(self.incoming.record_event())
            values.append(value)

        fetch(0)
        for k, home in enumerate(slices):
            if k + 1 < len(slices):
                fetch(k + 1)
            current.wait_event(arrivals[k])
            yield MicroBatch(values[k], partial(self._send, home, current))

    def _send(self, home: Tensor, current: torch.cuda.Stream, result: Tensor) -> None:
        self.outgoing.wait_stream(current)
        with torch.cuda.stream(self.outgoing):
            home.copy_(result, non_blocking=True)
        result.record_stream(self.outgoing)
