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


def text_tokens(source: str, folder: Path, config: Any, trust_remote_code: bool = False) -> Tensor:
    """Token ids of a whole text by the tokenizer of the checkpoint folder, int64 [tokens]."""
    text = calibration.read_text(source)
    tokens = calibration.tokenize(text, load_tokenizer(folder, trust_remote_code))
    calibration.check_vocabulary(tokens, config.vocab_size)
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
    check_length(sequence_length, config)
    if source == SELF:
        return calibration.sample_from_model(folder, samples, sequence_length, seed, device, dtype, progress)
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
    check_length(sequence_length, config)
    if source == SELF:
        samples = 64 if max_windows is None else max_windows
        return calibration.sample_from_model(folder, samples, sequence_length, seed, device, dtype, progress)
    tokens = text_tokens(source, folder, config, trust_remote_code)
    return calibration.consecutive_windows(tokens, sequence_length, max_windows)


def check_length(sequence_length: int, config: Any) -> None:
    limit = config.max_position_embeddings
    if sequence_length > limit:
        raise InputError(f"sequence length {sequence_length} exceeds the model's max_position_embeddings {limit}")


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
