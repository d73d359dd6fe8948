"""One accumulation for the layers that read the very same tensor (q, k, v; gate, up), and exact where they stop to.

Layers join when the first input of each is the tensor that an accumulator has just taken as its first. From then on an
input is held until every member has read it, unchanged, and is added once. Where a member reads another tensor, or
reads twice, the accumulator is split: the members that have read the held input get a copy of the sums with it added,
the others keep the sums without it. So each layer's statistics are over its own inputs, whatever happens.

Forwards may run in several threads. Each thread's inputs are held by themselves, and sums and memberships change in one
thread at a time. Layers join where the first forward is through before a second one begins; else they stay apart.

The same tensor: the same Python object at the same version, so not one that was changed in place in between.
"""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import ChannelMoments, Hessian
from ..ops.moments import row_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """Input of a layer. x: [..., channels]; kept: int64 indices of the rows that count, or None: all of them."""

    x: Tensor
    kept: Tensor | None
    version: int
    stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, x: Tensor, kept: Tensor | None) -> Reading:
        return cls(x, kept, x._version, torch.cuda.current_stream(x.device) if x.is_cuda else None)

    def same_as(self, other: Reading) -> bool:
        return self.x is other.x and self.kept is other.kept and self.version == other.version

    def unchanged(self) -> bool:
        return self.x._version == self.version

    def rows(self) -> Tensor:
        """Rows for the current stream, which may be another thread's than that of the input."""
        if self.stream is not None and self.stream != wait_for(self.stream, self.x.device):
            self.x.record_stream(torch.cuda.current_stream(self.x.device))
        return kept_rows(self.x, self.kept)


def wait_for(stream: torch.cuda.Stream, device: torch.device) -> torch.cuda.Stream:
    """The current stream of the device, after what `stream` has been given so far."""
    current = torch.cuda.current_stream(device)
    if current != stream:
        current.wait_stream(stream)
    return current


def kept_rows(x: Tensor, kept: Tensor | None) -> Tensor:
    """The rows of x [..., channels] with these indices, [len(kept), channels]; x itself for None."""
    return x if kept is None else x.detach().reshape(-1, x.shape[-1]).index_select(0, kept.to(x.device))


@dataclass
class Sums:
    """Accumulated statistics (None where one is not wanted), and the number of rows in them.

    stream: that of the last update, on a GPU.
    """

    hessian: Hessian | None
    moments: ChannelMoments | None
    count: int = 0
    stream: torch.cuda.Stream | None = None

    @classmethod
    def zeros(cls, channels: int, device: torch.device, hessian: bool, moments: bool) -> Sums:
        # A state made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            return cls(
                Hessian.zeros(channels, device) if hessian else None,
                ChannelMoments.zeros(channels, device) if moments else None,
            )

    def copy(self) -> Sums:
        """Return a copy."""
        self.follow()
        with torch.inference_mode(False):  # as in zeros
            return Sums(copy.deepcopy(self.hessian), copy.deepcopy(self.moments), self.count, self.stream)

    def follow(self) -> None:
        """Make the current stream wait for all updates."""
        if self.stream is not None:
            self.stream = wait_for(self.stream, self.stream.device)

    def update(self, x: Tensor) -> None:
        if x.is_cuda and self.stream is None:
            self.stream = torch.cuda.current_stream(x.device)
        self.follow()
        for statistic in (self.hessian, self.moments):
            if statistic is not None:
                statistic.update(x)
        self.count += row_count(x)


@dataclass(frozen=True)
class Held:
    """An input that not all members have read yet, and those who have not."""

    reading: Reading
    awaited: set[str]


@dataclass
class Accumulator:
    """The sums over the rows that each of its members (names of layers) has read; None before the first input.

    channels, hessian, moments: what to start the sums with. incomplete: an input was changed in place before it could
    be added, so rows are missing. held: by thread (threading.get_ident).
    """

    members: set[str]
    channels: int
    hessian: bool
    moments: bool
    sums: Sums | None = None
    incomplete: bool = False
    inputs: int = 0
    first: tuple[weakref.ref[Tensor], Tensor | None, int] | None = None
    held: dict[int, Held] = field(default_factory=dict)

    def add(self, x: Tensor) -> None:
        if self.sums is None:
            self.sums = Sums.zeros(self.channels, x.device, self.hessian, self.moments)
        self.sums.update(x)
        self.inputs += 1

    def began_with(self, reading: Reading) -> bool:
        """Return whether this is the only input so far."""
        if self.inputs != 1 or self.held or self.first is None:
            return False
        x, kept, version = self.first
        return x() is reading.x and kept is reading.kept and version == reading.version

    def expects(self, member: str, reading: Reading) -> bool:
        """Return whether it can take the input: this thread holds nothing, or this, which the member has not read."""
        own = self.held.get(threading.get_ident())
        return own is None or (member in own.awaited and own.reading.same_as(reading))

    def take(self, member: str, reading: Reading) -> None:
        """Add what is expected, once the last member reads it."""
        thread = threading.get_ident()
        own = self.held.setdefault(thread, Held(reading, set(self.members)))
        own.awaited.discard(member)
        if own.awaited:
            return
        del self.held[thread]
        if self.inputs == 0:
            self.first = (weakref.ref(reading.x), reading.kept, reading.version)
        self.add(reading.rows())

    def split(self, members: set[str]) -> Accumulator:
        """Split off a copy of the sums for these members; each side continues with what it holds."""
        self.members -= members
        sums = None if self.sums is None else self.sums.copy()
        apart = Accumulator(members, self.channels, self.hessian, self.moments, sums, self.incomplete, self.inputs)
        held, self.held = self.held, {}
        for thread, own in held.items():
            for side in (self, apart):
                side.go_on_with(thread, own)
        logger.warning(
            "%s and %s do not share their inputs any more; statistics are kept apart from here on",
            ", ".join(sorted(members)),
            ", ".join(sorted(self.members)),
        )
        return apart

    def go_on_with(self, thread: int, held: Held) -> None:
        """Hold what some of its members have read; add what all have, and forget what none has."""
        awaited = held.awaited & self.members
        if awaited and awaited != self.members:
            self.held[thread] = Held(held.reading, awaited)
        elif not awaited and held.reading.unchanged():
            self.add(held.reading.rows())
        elif not awaited:
            self.incomplete = True


class Accumulators:
    """The accumulator of each layer. channels: of each layer's inputs; the rest as in Accumulator.

    lock: held to read or change them. Products of one thread keep all cores or the GPU busy anyway.
    """

    def __init__(self, channels: Mapping[str, int], hessian: bool, moments: bool) -> None:
        self._of = {name: Accumulator({name}, width, hessian, moments) for name, width in channels.items()}
        self.lock = threading.RLock()

    def __getitem__(self, name: str) -> Accumulator:
        """The layer's, with all that it has read in it."""
        with self.lock:
            self._settle(self._of[name])
            own = self._of[name]
            if own.sums is not None:
                own.sums.follow()
            return own

    def read_alone(self, name: str, x: Tensor, kept: Tensor | None) -> None:
        """The layer reads x, and no other layer is asked whether it does."""
        with self.lock:
            own = self[name]
            if len(own.members) > 1:
                own = self._place(own.split({name}))
            own.add(kept_rows(x, kept))

    def read_shared(self, name: str, x: Tensor, kept: Tensor | None) -> None:
        """Take x as a layer's input; it is added once for all layers that read it."""
        reading = Reading.of(x, kept)
        with self.lock:
            own = self._of[name]
            if own.inputs == 0 and not own.held:
                joined = next((other for other in self._of.values() if other.began_with(reading)), None)
                if joined is not None:
                    joined.members.add(name)
                    self._of[name] = joined
                    return
            if not own.expects(name, reading):
                self._settle_thread(own, threading.get_ident())
            self._of[name].take(name, reading)

    def settle(self) -> None:
        """Add everything that is held."""
        with self.lock:
            for accumulator in list(self._of.values()):
                self._settle(accumulator)

    def _settle(self, accumulator: Accumulator) -> None:
        for name in list(accumulator.members):
            while held := self._of[name].held:
                self._settle_thread(self._of[name], next(iter(held)))

    def _settle_thread(self, accumulator: Accumulator, thread: int) -> None:
        """Add the input that the thread holds for the members that have read it; they leave."""
        held = accumulator.held.get(thread)
        if held is not None:
            self._place(accumulator.split(accumulator.members - held.awaited))

    def _place(self, accumulator: Accumulator) -> Accumulator:
        for member in accumulator.members:
            self._of[member] = accumulator
        return accumulator
