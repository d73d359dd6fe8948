"""Token windows of a model: from a text, sampled from the model itself, or as a caller gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import ModelInMemory
from ..checkpoint.load_model import vocabulary_size
from ..errors import InputError
from . import CONCATENATE, PACKINGS, SEPARATE
from .mixture import is_mixture
from .packing import Encoder, concatenated, separated
from .sampling import sample_from_model
from .sources.builtin import BUILTIN
from .sources.documents import Documents
from .sources.hub import is_dataset
from .sources.open import open_documents
from .text import check_vocabulary, load_tokenizer
from .windows import check_sizes, consecutive_windows, fingerprint, fit_length, spread_over, spread_windows

SELF = "self"
Progress = Callable[[int, int], None]  # tokens sampled, tokens in total
# A name, a list of documents, token ids, a data set; of a calibration also several of them with shares.
Text = Any
DEFAULT_WINDOWS = 64  # of a sampled evaluation text
# Tokens that are read of a stream, as a multiple of those in the windows. At random starts a window has 1 token in 6
# in common with its neighbours if the text is as long as all windows, 1 in 24 if it is twice as long.
_STREAM_FACTOR = 2


def is_self(text: Text) -> bool:
    """Return whether a text is the one that the model writes."""
    return isinstance(text, str) and text == SELF


@dataclass(frozen=True)
class ReadWindows:
    """Windows of one text, and what is recorded of it.

    ids: int64 [windows, length]. fingerprint: SHA-256, in hex, of the documents that were read, or of the windows
    where there are none. revision: commit of a data set of the hub.
    """

    ids: Tensor
    fingerprint: str
    revision: str | None = None


@dataclass(frozen=True)
class TokenSource:
    """A text, and the model, in a folder or in memory, whose tokens it becomes.

    text: a name (a file, `builtin`, a data set of the hub; `self`: sampled from the model), a list of documents, a
    data set of the library `datasets`, or token ids, int64 [windows, tokens], which are taken as they are.
    packing: `concatenate` (windows start anywhere) or `separate` (at documents). column: of rows, that holds the text.
    """

    text: Text
    origin: Path | ModelInMemory
    config: Any
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    packing: str = CONCATENATE
    column: str | None = None

    @property
    def sampled(self) -> bool:
        return is_self(self.text)

    def calibration(self, samples: int, length: int, seed: int, progress: Progress | None = None) -> Tensor:
        """Windows to calibrate on, int64 [samples, length]; fewer of a built-in text that is shorter.

        Raises:
            InputError: the text cannot be read or is too short, or the model has fewer positions.
        """
        return self.read_calibration(samples, length, seed, progress).ids

    def evaluation(self, length: int, most: int | None, seed: int, progress: Progress | None = None) -> Tensor:
        """Windows to evaluate on, int64 [windows, length]: the text cut from its start, or sampled (64 by default).

        Raises:
            InputError: as `calibration`.
        """
        fit_length(length, True, self.config)
        check_sizes(1 if most is None else most, length)
        if self.sampled:
            return self._sample(DEFAULT_WINDOWS if most is None else most, length, seed, progress)
        if isinstance(self.text, Tensor):
            return self._given(most or len(self.text), length)
        documents = self._documents()
        if self.packing == SEPARATE:
            windows = self._separated(documents, length, most)
            return windows[:most]
        # One window more than needed, since documents joined may have a token less than one by one.
        enough = None if most is None or documents.whole else (most + 1) * length
        return consecutive_windows(self._concatenated(documents, enough), length, most)

    def read_calibration(self, samples: int, length: int, seed: int, progress: Progress | None = None) -> ReadWindows:
        """Read the windows of `calibration`, and what is recorded of their text."""
        fit_length(length, True, self.config)
        if self.sampled or isinstance(self.text, Tensor):
            windows = self._sample(samples, length, seed, progress) if self.sampled else self._given(samples, length)
            return ReadWindows(windows, fingerprint(windows))
        check_sizes(samples, length)
        documents = self._documents()
        if self.packing == SEPARATE:
            windows = self._separated(documents, length, None if documents.whole else samples)
            windows = spread_over(windows, self._fewer(len(windows), samples), seed)
        else:
            enough = None if documents.whole else _STREAM_FACTOR * samples * length
            tokens = self._concatenated(documents, enough)
            windows = spread_windows(tokens, self._fewer(len(tokens) // length, samples), length, seed)
        return ReadWindows(windows, documents.fingerprint, documents.revision)

    def _fewer(self, there: int, samples: int) -> int:
        """Windows to take of `there`: the built-in text gives fewer than asked for where it is too short."""
        return min(there, samples) if self.text == BUILTIN and there > 0 else samples

    def _documents(self) -> Documents:
        if self.packing not in PACKINGS:
            raise InputError(f"packing {self.packing!r}: one of {', '.join(PACKINGS)}")
        if is_mixture(self.text):
            raise InputError("several texts with shares are to calibrate on: evaluate on one text at a time")
        return open_documents(self.text, self.column)

    def _encoder(self) -> Encoder:
        return Encoder(load_tokenizer(self.origin, self.trust_remote_code), str(self.origin))

    def _concatenated(self, documents: Documents, enough: int | None) -> Tensor:
        tokens = concatenated(documents, self._encoder(), enough)
        check_vocabulary(tokens, vocabulary_size(self.config))
        return tokens

    def _separated(self, documents: Documents, length: int, most: int | None) -> Tensor:
        windows = separated(documents, self._encoder(), length, most)
        if len(windows) == 0:
            raise InputError(f"{documents.name}: its documents do not fill one window of {length} tokens")
        check_vocabulary(windows, vocabulary_size(self.config))
        return windows

    def _sample(self, samples: int, length: int, seed: int, progress: Progress | None) -> Tensor:
        return sample_from_model(
            self.origin, samples, length, seed, self.device, self.dtype, progress, self.trust_remote_code
        )

    def _given(self, samples: int, length: int) -> Tensor:
        assert isinstance(self.text, Tensor)
        windows = self.text.detach().to("cpu", torch.int64)
        if windows.dim() != 2 or len(windows) < samples or windows.shape[1] != length:
            raise InputError(
                f"token ids of shape {list(self.text.shape)}: [windows, tokens] is needed, here [{samples}, {length}]"
            )
        check_vocabulary(windows, vocabulary_size(self.config))
        return windows[:samples]


def described(text: Text) -> str:
    """A text in words, for plan.json and messages."""
    if isinstance(text, Tensor):
        return f"token ids {list(text.shape)}"
    if is_mixture(text):
        pairs = text.items() if isinstance(text, dict) else text
        return ", ".join(described(own) + ("" if share is None else f"={share:g}") for own, share in pairs)
    if is_dataset(text):
        return type(text).__name__
    return f"{len(text)} documents" if isinstance(text, list | tuple) else str(text)
