"""From what the user names as a text (.txt, .jsonl, `self`) to the token windows of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.load_model import vocabulary_size
from ..errors import InputError
from ..runtime.files import reason_of
from . import text as calibration

SELF = "self"
Tokens = Callable[[int, int], None]  # tokens sampled, tokens in all


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder. InputError: there is none, or it does not load."""
    from transformers import AutoTokenizer

    with refused_by_tokenizers(f"{folder}: no tokenizer can be loaded from there"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


@contextmanager
def refused_by_tokenizers(what: str) -> Iterator[None]:
    """Tokenizer libraries raise bare Exceptions for broken files, and panics of Rust, which are none: an InputError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what} ({reason_of(error)})") from error


def text_tokens(source: str, folder: Path, config: Any, trust_remote_code: bool = False) -> Tensor:
    """Token ids of a whole text by the tokenizer of the checkpoint folder, int64 [tokens]."""
    text = calibration.read_text(source)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    with refused_by_tokenizers(f"{folder}: its tokenizer cannot encode the text"):
        tokens = calibration.tokenize(text, tokenizer)
    calibration.check_vocabulary(tokens, vocabulary_size(config))
    return tokens


def calibration_windows(
    source: str,
    folder: Path,
    config: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    progress: Tokens | None = None,
) -> Tensor:
    """Windows to calibrate on, int64 [samples, sequence_length]: spread over a text, or sampled."""
    fit_length(sequence_length, True, config)
    if source == SELF:
        return calibration.sample_from_model(
            folder, samples, sequence_length, seed, device, dtype, progress, trust_remote_code
        )
    tokens = text_tokens(source, folder, config, trust_remote_code)
    return calibration.spread_windows(tokens, samples, sequence_length, seed)


def evaluation_windows(
    source: str,
    folder: Path,
    config: Any,
    sequence_length: int,
    max_windows: int | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    progress: Tokens | None = None,
) -> Tensor:
    """Windows to evaluate on, int64 [windows, sequence_length]: the text cut from its start, or sampled.

    `self` samples from the model in `folder`; 64 windows unless told otherwise.
    """
    fit_length(sequence_length, True, config)
    if source == SELF:
        samples = 64 if max_windows is None else max_windows
        return calibration.sample_from_model(
            folder, samples, sequence_length, seed, device, dtype, progress, trust_remote_code
        )
    tokens = text_tokens(source, folder, config, trust_remote_code)
    return calibration.consecutive_windows(tokens, sequence_length, max_windows)


def fit_length(sequence_length: int, typed: bool, config: Any) -> tuple[int, str | None]:
    """A window's length within the positions of a model, and a note where it was cut: only a default is.

    A model that names no number of positions has no limit. InputError: a `typed` length is beyond it.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or sequence_length <= limit:
        return sequence_length, None
    if typed or limit < 2:
        raise InputError(f"sequence length {sequence_length} exceeds the model's max_position_embeddings {limit}")
    return limit, f"windows of {limit} tokens, not {sequence_length}: the model has no more positions"


def checked_windows(
    path: Path, tensors: dict[str, Tensor], samples: int | None, sequence_length: int, vocab_size: int
) -> Tensor:
    """The windows in a cache's file; samples None: of any number.

    Raises:
        InputError: naming the file, which holds other tensors, another number of windows, or no ids of the model.
    """
    windows = tensors.get("windows")
    if windows is None or windows.dtype != torch.int64 or windows.dim() != 2 or len(windows) < 1:
        raise InputError(f"{path}: damaged sampled text (no windows of token ids); delete it")
    if windows.shape[1] != sequence_length or len(windows) != (samples or len(windows)):
        raise InputError(f"{path}: damaged sampled text (windows of shape {list(windows.shape)}); delete it")
    try:
        calibration.check_vocabulary(windows, vocab_size)
    except InputError as error:
        raise InputError(f"{path}: damaged sampled text ({error}); delete it") from error
    return windows
