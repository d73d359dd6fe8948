"""Token windows of a model: from a text, sampled from the model itself, or as a caller gives them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import ModelInMemory
from ..checkpoint.load_model import vocabulary_size
from ..errors import InputError
from .sampling import sample_from_model
from .text import check_vocabulary, joined_documents, load_tokenizer, read_text, refused_by_tokenizers, tokenize
from .windows import consecutive_windows, fit_length, spread_windows

SELF = "self"
Progress = Callable[[int, int], None]  # tokens sampled, tokens in total
Text = str | Sequence[str] | Tensor
DEFAULT_WINDOWS = 64  # of a sampled evaluation text


@dataclass(frozen=True)
class TokenSource:
    """A text, and the model, in a folder or in memory, whose tokens it becomes.

    text: a path (.txt, .jsonl), `self` (sampled from the model), a list of documents, or token ids, int64
    [windows, tokens], which are taken as they are.
    """

    text: Text
    origin: Path | ModelInMemory
    config: Any
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False

    @property
    def sampled(self) -> bool:
        return isinstance(self.text, str) and self.text == SELF

    def calibration(self, samples: int, length: int, seed: int, progress: Progress | None = None) -> Tensor:
        """Windows to calibrate on, int64 [samples, length]: spread over the text, or sampled.

        Raises:
            InputError: the text cannot be read or is too short, or the model has fewer positions.
        """
        fit_length(length, True, self.config)
        if self.sampled:
            return self._sample(samples, length, seed, progress)
        if isinstance(self.text, Tensor):
            return self._given(samples, length)
        return spread_windows(self.tokens(), samples, length, seed)

    def evaluation(self, length: int, most: int | None, seed: int, progress: Progress | None = None) -> Tensor:
        """Windows to evaluate on, int64 [windows, length]: the text cut from its start, or sampled (64 by default).

        Raises:
            InputError: as `calibration`.
        """
        fit_length(length, True, self.config)
        if self.sampled:
            return self._sample(DEFAULT_WINDOWS if most is None else most, length, seed, progress)
        if isinstance(self.text, Tensor):
            return self._given(most or len(self.text), length)
        return consecutive_windows(self.tokens(), length, most)

    def tokens(self) -> Tensor:
        """Token ids of the whole text by the model's tokenizer, int64 [tokens]."""
        assert not isinstance(self.text, Tensor)
        text = read_text(self.text) if isinstance(self.text, str) else joined_documents(self.text)
        tokenizer = load_tokenizer(self.origin, self.trust_remote_code)
        with refused_by_tokenizers(f"{self.origin}: its tokenizer cannot encode the text"):
            tokens = tokenize(text, tokenizer)
        check_vocabulary(tokens, vocabulary_size(self.config))
        return tokens

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
    if isinstance(text, str):
        return text
    if isinstance(text, Tensor):
        return f"token ids {list(text.shape)}"
    return f"{len(text)} documents"
