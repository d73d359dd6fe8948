"""Several texts to calibrate on: as they are spelled, their shares of the windows, and the windows in one order."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .sources.files import is_file_name

# Shares are typed with two or three digits: three of 0.33 are a whole.
_ROUNDING = 0.0101


@dataclass(frozen=True)
class Part:
    """A text, its share of the calibration tokens, and the windows that it gives."""

    text: Any
    share: float
    windows: int


def spelled_texts(words: Sequence[str]) -> Any:
    """The calibration that words of the command line name, each TEXT or TEXT=SHARE.

    Returns:
        None for no word, the text itself for one without a share, else pairs (text, share or None).

    Raises:
        InputError: what follows the `=` of a text is not a number.
    """
    pairs = [_split(word) for word in words]
    return None if not pairs else pairs[0][0] if len(pairs) == 1 and pairs[0][1] is None else pairs


def words_of(calibration: Any) -> str | list[str] | None:
    """Spell a calibration as `spelled_texts` reads it: a text, or several with their shares.

    Returns:
        None where one of the texts has no name: documents, token ids.
    """
    if not is_mixture(calibration):
        return calibration if isinstance(calibration, str) else None
    pairs = _pairs(calibration)
    if not all(isinstance(text, str) for text, _ in pairs):
        return None
    return [text if share is None else f"{text}={share!r}" for text, share in pairs]


def _split(word: str) -> tuple[str, float | None]:
    """A text and its share. A file whose name ends like a share is that file."""
    text, sign, share = word.rpartition("=")
    if not sign or "/" in share or _is_there(word):
        return word, None
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", share, re.ASCII | re.IGNORECASE):
        return text, float(share)
    if is_file_name(word):
        return word, None
    raise InputError(f"{word}: the share behind `=` is not a number: write it as {text}=0.3")


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def is_mixture(calibration: Any) -> bool:
    """Whether a calibration is several texts: pairs (text, share), or shares by text."""
    if isinstance(calibration, Mapping):
        return True
    return isinstance(calibration, list | tuple) and bool(calibration) and isinstance(calibration[0], tuple)


def _pairs(calibration: Any) -> list[Any]:
    """Texts of a mixture with their shares."""
    return [*(calibration.items() if isinstance(calibration, Mapping) else calibration)]


def parts_of(calibration: Any, samples: int) -> list[Part]:
    """Split windows among texts in proportion to their shares, by largest remainders.

    Args:
        calibration: one text, or several as pairs (text, share) or a mapping; a share None everywhere: equal shares.
        samples: windows in all.

    Raises:
        InputError: shares of some texts only, not above 0, not 1 in sum, or below one window; a text given twice.
    """
    if not is_mixture(calibration):
        return [Part(calibration, 1.0, samples)]
    pairs = _pairs(calibration)
    shares = _shares(pairs)
    exact = [share * samples for share in shares]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(pairs)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    for (text, _), share, count in zip(pairs, shares, counts, strict=True):
        if count == 0:
            raise InputError(
                f"{_name(text)}: its share {share:.3g} of {samples} windows is not one: ask for more windows"
            )
    return [Part(text, share, count) for (text, _), share, count in zip(pairs, shares, counts, strict=True)]


def _shares(pairs: list[Any]) -> list[float]:
    """The shares, which sum to 1."""
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs) or not pairs:
        raise InputError("several texts are pairs (text, share) or shares by text")
    named = [text for text, _ in pairs if isinstance(text, str)]
    twice = next((text for i, text in enumerate(named) if text in named[:i]), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice as a calibration text")
    without = [text for text, share in pairs if share is None]
    if len(without) == len(pairs):
        return [1 / len(pairs)] * len(pairs)
    if without:
        raise InputError(
            f"{_name(without[0])} has no share, others have one: give all texts a share (TEXT=0.3) or none"
        )
    for text, share in pairs:
        if not isinstance(share, int | float) or not 0 < share < math.inf:
            raise InputError(f"{_name(text)}: its share is {share}: it must be above 0, and all must sum to 1")
    total = math.fsum(share for _, share in pairs)
    if abs(total - 1) > _ROUNDING:
        right = " ".join(f"{_name(text)}={share / total:.3g}" for text, share in pairs)
        raise InputError(f"the shares of the calibration texts sum to {total:.3g}: they must sum to 1, as in {right}")
    return [share / total for _, share in pairs]


def _name(text: Any) -> str:
    return text if isinstance(text, str) else "a calibration text"


def interleaved(windows: list[Tensor]) -> Tensor:
    """One tensor of the windows of all texts, spread so that any first part of it holds them in their proportion.

    Passes that use the first windows only (`--allocation-samples`) so see every text. One text's windows keep their
    order.
    """
    places = [((i + 0.5) / len(own), part, i) for part, own in enumerate(windows) for i in range(len(own))]
    return torch.stack([windows[part][i] for _, part, i in sorted(places)])
