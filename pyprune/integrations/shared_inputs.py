"""One accumulation for the layers that read the very same tensor (q, k, v; gate, up), and exact where they stop to.

Layers join when the first input of each is the tensor that an accumulator has just taken as its first. From then on an
input is held until every member has read it, unchanged, and is added once. Where a member reads another tensor, or
reads twice, the accumulator is split: the members that have read the held input get a copy of the sums with it added,
the others keep the sums without it. So each layer's statistics are over its own inputs, whatever happens.

The same tensor: the same Python object at the same version, so not one that was changed in place in between.
"""

from __future__ import annotations

import copy
import logging
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
    """What a layer reads. x: [..., channels]; kept: int64 indices of the rows that count, or None: all of them."""

    x: Tensor
    kept: Tensor | None
    version: int

    def same_as(self, other: Reading) -> bool:
        return self.x is other.x and self.kept is other.kept and self.version == other.version

    def unchanged(self) -> bool:
        return self.x._version == self.version

    def rows(self) -> Tensor:
        return kept_rows(self.x, self.kept)


def kept_rows(x: Tensor, kept: Tensor | None) -> Tensor:
    """The rows of x [..., channels] with these indices, [len(kept), channels]; x itself for None."""
    return x if kept is None else x.detach().reshape(-1, x.shape[-1]).index_select(0, kept.to(x.device))


@dataclass
class Sums:
    """What is accumulated: each statistic, or None where it is not wanted, and the rows in it."""

    hessian: Hessian | None
    moments: ChannelMoments | None
    count: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device, hessian: bool, moments: bool) -> Sums:
        # A state made in inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            return cls(
                Hessian.zeros(channels, device) if hessian else None,
                ChannelMoments.zeros(channels, device) if moments else None,
            )

    def update(self, x: Tensor) -> None:
        for statistic in (self.hessian, self.moments):
            if statistic is not None:
                statistic.update(x)
        self.count += row_count(x)


@dataclass
class Accumulator:
    """The sums over the rows that each of its members (names of layers) has read; None before the first input.

    channels, hessian, moments: what to start the sums with. incomplete: an input was changed in place before it could
    be added, so rows are missing.
    """

    members: set[str]
    channels: int
    hessian: bool
    moments: bool
    sums: Sums | None = None
    incomplete: bool = False
    inputs: int = 0
    first: tuple[weakref.ref[Tensor], Tensor | None, int] | None = None
    held: Reading | None = None
    awaited: set[str] = field(default_factory=set)

    def add(self, x: Tensor) -> None:
        if self.sums is None:
            self.sums = Sums.zeros(self.channels, x.device, self.hessian, self.moments)
        self.sums.update(x)
        self.inputs += 1

    def began_with(self, reading: Reading) -> bool:
        """Whether this is the only input so far."""
        if self.inputs != 1 or self.held is not None or self.first is None:
            return False
        x, kept, version = self.first
        return x() is reading.x and kept is reading.kept and version == reading.version

    def expects(self, member: str, reading: Reading) -> bool:
        """Whether it can take this now: nothing is held, or this is held and the member has not read it yet."""
        return self.held is None or (member in self.awaited and self.held.same_as(reading))

    def take(self, member: str, reading: Reading) -> None:
        """Add what is expected, once the last member reads it."""
        if self.held is None:
            self.held, self.awaited = reading, set(self.members)
        self.awaited.discard(member)
        if self.awaited:
            return
        if self.inputs == 0:
            self.first = (weakref.ref(reading.x), reading.kept, reading.version)
        self.add(reading.rows())
        self.held = None

    def copy_for(self, members: set[str]) -> Accumulator:
        """The same sums in memory of their own for these members, who leave."""
        self.members -= members
        with torch.inference_mode(False):  # as in Sums.zeros
            sums = copy.deepcopy(self.sums)
        apart = Accumulator(members, self.channels, self.hessian, self.moments, sums, self.incomplete, self.inputs)
        logger.warning(
            "%s and %s do not share their inputs any more; statistics are kept apart from here on",
            ", ".join(sorted(members)),
            ", ".join(sorted(self.members)),
        )
        return apart

    def split(self) -> Accumulator:
        """A copy for the members that have read what is held, with it added; without it, this is for the others."""
        held, self.held = self.held, None
        assert held is not None
        apart = self.copy_for(self.members - self.awaited)
        if held.unchanged():
            apart.add(held.rows())
        else:
            apart.incomplete = True
        self.awaited = set()
        return apart


class Accumulators:
    """The accumulator of each layer. channels: of each layer's inputs; the rest as in Accumulator."""

    def __init__(self, channels: Mapping[str, int], hessian: bool, moments: bool) -> None:
        self._of = {name: Accumulator({name}, width, hessian, moments) for name, width in channels.items()}

    def __getitem__(self, name: str) -> Accumulator:
        """The layer's, with all that it has read in it."""
        self._settle(self._of[name])
        return self._of[name]

    def read_alone(self, name: str, x: Tensor, kept: Tensor | None) -> None:
        """The layer reads x, and no other layer is asked whether it does."""
        own = self[name]
        if len(own.members) > 1:
            own = self._place(own.copy_for({name}))
        own.add(kept_rows(x, kept))

    def read_shared(self, name: str, x: Tensor, kept: Tensor | None) -> None:
        """The layer reads x, which is added once for all that read it."""
        reading = Reading(x, kept, x._version)
        own = self._of[name]
        if own.inputs == 0 and own.held is None:
            joined = next((other for other in self._of.values() if other.began_with(reading)), None)
            if joined is not None:
                joined.members.add(name)
                self._of[name] = joined
                return
        if not own.expects(name, reading):
            self._settle(own)
        self._of[name].take(name, reading)

    def settle(self) -> None:
        """Nothing is held any more."""
        for accumulator in list(self._of.values()):
            self._settle(accumulator)

    def _settle(self, accumulator: Accumulator) -> None:
        if accumulator.held is not None:
            self._place(accumulator.split())

    def _place(self, accumulator: Accumulator) -> Accumulator:
        for member in accumulator.members:
            self._of[member] = accumulator
        return accumulator
