"""From what the user names as a text (.txt, .jsonl, `self`) to the token windows of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import calibration
from .errors import InputError

SELF = "self"
Tokens = Callable[[int, int], None]  # tokens sampled, tokens in all


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer libraries raise bare Exceptions for broken files
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: no tokenizer can be loaded from there ({reason})") from error


def text_tokens(source: str, folder: Path, vocab_size: int, trust_remote_code: bool = False) -> Tensor:
    """Token ids of a whole text by the tokenizer of the checkpoint folder, int64 [tokens]."""
    text = calibration.read_text(source)
    tokens = calibration.tokenize(text, load_tokenizer(folder, trust_remote_code))
    calibration.check_vocabulary(tokens, vocab_size)
    return tokens


def calibration_windows(
    source: str,
    folder: Path,
    vocab_size: int,
    samples: int,
    sequence_length: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    progress: Tokens | None = None,
) -> Tensor:
    """Windows to calibrate on, int64 [samples, sequence_length]: spread over a text, or sampled."""
    if source == SELF:
        return calibration.sample_from_model(folder, samples, sequence_length, seed, device, dtype, progress)
    tokens = text_tokens(source, folder, vocab_size, trust_remote_code)
    return calibration.spread_windows(tokens, samples, sequence_length, seed)


def evaluation_windows(
    source: str,
    folder: Path,
    vocab_size: int,
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
    if source == SELF:
        return calibration.sample_from_model(folder, max_windows or 64, sequence_length, seed, device, dtype, progress)
    tokens = text_tokens(source, folder, vocab_size, trust_remote_code)
    return calibration.consecutive_windows(tokens, sequence_length, max_windows)
