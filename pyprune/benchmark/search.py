"""The choice of a configuration from timings: what is faster than the shipped one by more than noise.

It measures nothing itself. Every candidate is timed alone first; the best few and the shipped one are then timed in
turn, round by round, so that clocks and temperature are the same for all. In a round a candidate's gain is the shipped
one's time over its own. Of a shape's rounds the median counts, with the standard error that their median deviation
gives; over the shapes the mean of logarithms. A candidate is taken if that mean exceeds LEAST_GAIN by THRESHOLD
standard errors, and if on no shape it is slower by more than that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

C = TypeVar("C")
Shape = tuple[int, int]

FINALISTS = 3
# A candidate that takes so much longer than the shipped one on a shape is not timed on the others.
HOPELESS = 1.3
LEAST_GAIN = math.log(1.01)  # other bits are not worth less
THRESHOLD = 3.0
# Ratios of a normal distribution: standard deviation to median deviation; standard error of a median to that of a
# mean.
DEVIATIONS, MEDIANS = 1.4826, math.sqrt(math.pi / 2)


class Unusable(Exception):
    """A configuration that does not compile, does not fit, or gives a wrong result: the reason in a line."""


# (configurations, shape, whether it is the final) -> microseconds of every round, by configuration; raises Unusable.
Measure = Callable[[Sequence[C], Shape, bool], list[list[float]]]


@dataclass(frozen=True)
class Gain:
    """Times faster than the shipped configuration, as a logarithm, and its standard error."""

    log: float
    error: float

    @property
    def times(self) -> float:
        return math.exp(self.log)

    @property
    def certain(self) -> float:
        """Lower bound of the logarithm: THRESHOLD standard errors below it."""
        return self.log - THRESHOLD * self.error


@dataclass
class Finding(Generic[C]):
    """Result of a search. gain: of the best candidate, also where it was not taken; skipped: (candidate, reason)."""

    shipped: C
    best: C
    gain: Gain
    by_shape: dict[Shape, Gain]
    taken: bool
    skipped: list[tuple[C, str]] = field(default_factory=list)


def gain_of(shipped: Sequence[float], own: Sequence[float]) -> Gain:
    """Estimate the gain from rounds that were timed in turn."""
    logs = [math.log(before / after) for before, after in zip(shipped, own, strict=True)]
    middle = statistics.median(logs)
    deviation = statistics.median(abs(value - middle) for value in logs)
    return Gain(middle, MEDIANS * DEVIATIONS * deviation / math.sqrt(len(logs)))


def combined(gains: Sequence[Gain]) -> Gain:
    error = math.sqrt(sum(gain.error**2 for gain in gains)) / len(gains)
    return Gain(statistics.fmean(gain.log for gain in gains), error)


def is_gain(gains: Sequence[Gain]) -> bool:
    slower = any(gain.log + THRESHOLD * gain.error < -LEAST_GAIN for gain in gains)
    return combined(gains).certain > LEAST_GAIN and not slower


def search(
    shipped: C,
    candidates: Sequence[C],
    shapes: Sequence[Shape],
    measure: Measure[C],
    advance: Callable[[int], None] = lambda number: None,
) -> Finding[C]:
    """`advance` is told each candidate's number before it is timed. Unusable: the shipped configuration itself is."""
    before = {shape: statistics.median(measure([shipped], shape, False)[0]) for shape in shapes}
    skipped: list[tuple[C, str]] = []
    scores: list[tuple[float, C]] = []
    for number, candidate in enumerate(candidates):
        advance(number)
        if candidate == shipped:
            continue
        logs = []
        try:
            for shape in shapes:
                after = statistics.median(measure([candidate], shape, False)[0])
                logs.append(math.log(before[shape] / after))
                if after > HOPELESS * before[shape]:
                    break
        except Unusable as error:
            skipped.append((candidate, str(error)))
            continue
        if len(logs) == len(shapes):
            scores.append((statistics.fmean(logs), candidate))
    # Timings of the first stage drift; what is a little slower there may still be faster.
    finalists = [candidate for _, candidate in sorted(scores, key=lambda score: score[0])[-FINALISTS:]]
    gains: list[dict[Shape, Gain]] = [{} for _ in finalists]
    if finalists:
        for shape in shapes:
            first, *others = measure([shipped, *finalists], shape, True)
            for own, rounds in zip(gains, others, strict=True):
                own[shape] = gain_of(first, rounds)
    ranked = sorted(zip(finalists, gains, strict=True), key=lambda one: combined(list(one[1].values())).log)
    taken = [one for one in ranked if is_gain(list(one[1].values()))]
    if not ranked:
        return Finding(shipped, shipped, Gain(0.0, 0.0), {}, False, skipped)
    best, by_shape = (taken or ranked)[-1]
    return Finding(shipped, best, combined(list(by_shape.values())), by_shape, bool(taken), skipped)
