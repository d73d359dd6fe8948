"""Standard errors of perplexities, from the spread of the windows' losses."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def perplexity_error(losses: Sequence[float]) -> float | None:
    """Standard error of exp(mean of `losses`) by the delta method: the perplexity times that of the mean.

    Windows count as independent draws. None: one window has no spread.
    """
    return _standard_error([math.exp(fmean(losses)) * loss for loss in losses])


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """The difference of two perplexities on the same windows, and its standard error (None: of one window).

    Losses are paired by window, so what makes a window hard for both models cancels out.
    """
    here, there = math.exp(fmean(losses)), math.exp(fmean(reference))
    changes = [here * loss - there * other for loss, other in zip(losses, reference, strict=True)]
    return here - there, _standard_error(changes)


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
