"""Run a GGUF file in llama.cpp: tokens, logits and perplexity, to compare with transformers."""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..runtime.optional import import_extra

# Tokens of a llama_decode call: what it computes at a time, and how many rows of logits it holds.
_BATCH = 256
_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h


def tokens_gguf(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the file asks for around it.

    Special tokens are found in the text as well, as transformers does. InputError: as `logits_gguf`.
    """
    llama = import_extra("llama_cpp")
    tokens = []
    with _model(file, vocabulary_only=True) as model:
        vocabulary = llama.llama_model_get_vocab(model)
        for text in texts:
            data = text.encode()
            ids = (llama.llama_token * (len(data) + 16))()  # no token is shorter than a byte
            count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
            if count < 0:
                raise RuntimeError(f"llama_tokenize makes {-count} tokens of {len(data)} bytes")
            tokens.append(list(ids[:count]))
    return tokens


def logits_gguf(file: Path, ids: list[int]) -> Tensor:
    """Logits after each token of one sequence: float32 [tokens, vocabulary]. Keys and values are cached in float32.

    InputError: llama_cpp is not installed, llama.cpp refuses the file, or an id is outside the vocabulary.
    """
    with _model(file) as model, _context(model, len(ids)) as context:
        return torch.cat(list(_decode(model, context, ids)))


def perplexity_gguf(file: Path, windows: Tensor) -> float:
    """exp of the mean over windows of each window's mean cross-entropy, as evaluation.perplexity computes it.

    `windows` is int64 [windows, sequence_length]. Log-softmax in float32, means in float64.
    InputError: as `logits_gguf`, or windows of fewer than 2 tokens.
    """
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows of shape {list(windows.shape)}: at least 1 window of 2 tokens is needed")
    llama = import_extra("llama_cpp")
    losses = []
    with _model(file) as model, _context(model, windows.shape[1]) as context:
        for window in windows:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            loss, begin = 0.0, 0
            for logits in _decode(model, context, window.tolist()):
                targets = window[begin + 1 : begin + 1 + len(logits)]
                log_p = torch.log_softmax(logits[: len(targets)], dim=-1)
                loss += F.nll_loss(log_p, targets, reduction="none").double().sum().item()
                begin += len(logits)
            losses.append(loss / (len(window) - 1))
    return math.exp(math.fsum(losses) / len(losses))


@contextmanager
def _model(file: Path, vocabulary_only: bool = False) -> Iterator[Any]:
    """A loaded file. Meanwhile llama.cpp's log goes into the text of a refusal, and not to stderr."""
    llama = import_extra("llama_cpp")
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.vocab_only = vocabulary_only
    # Repacked weights and AMX buffers round differently, and crash on some virtual machines without AMX.
    parameters.use_extra_bufts = False
    with _log(llama) as errors:
        model = llama.llama_model_load_from_file(str(file).encode(), parameters)
        if not model:
            raise InputError(f"{file}: llama.cpp cannot load it ({'; '.join(errors) or 'it does not say why'})")
        try:
            yield model
        finally:
            llama.llama_model_free(model)


@contextmanager
def _context(model: Any, tokens: int) -> Iterator[Any]:
    llama = import_extra("llama_cpp")
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = tokens
    parameters.n_batch = parameters.n_ubatch = _BATCH
    parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
    parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
    parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError(f"llama_init_from_model makes no context of {tokens} tokens")
    try:
        yield context
    finally:
        llama.llama_free(context)


@contextmanager
def _log(llama: Any) -> Iterator[list[str]]:
    """The errors that llama.cpp logs meanwhile."""
    before, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    lines: list[str] = []

    @llama.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == _ERROR:
            lines.append(text.decode(errors="replace").strip())

    llama.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama.llama_log_set(before, data)


def _decode(model: Any, context: Any, ids: list[int]) -> Iterator[Tensor]:
    """Logits float32 [up to _BATCH, vocabulary] of consecutive parts of a sequence that starts the cache."""
    llama = import_extra("llama_cpp")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise InputError(f"token ids must be at least one, from 0 to {vocabulary - 1}")
    batch = llama.llama_batch_init(_BATCH, 0, 1)
    try:
        for begin in range(0, len(ids), _BATCH):
            part = ids[begin : begin + _BATCH]
            batch.n_tokens = len(part)
            for row, token in enumerate(part):
                batch.token[row] = token
                batch.pos[row] = begin + row
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = 0
                batch.logits[row] = 1
            status = llama.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status} for tokens {begin} to {begin + len(part) - 1}")
            rows = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(part), vocabulary))
            yield torch.from_numpy(rows.copy())
    finally:
        llama.llama_batch_free(batch)
