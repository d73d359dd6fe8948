"""Text → windows of token ids, to calibrate on (spread over the text) or to evaluate on (consecutive windows)."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..checkpoint.load_model import load_model
from ..errors import InputError
from ..runtime.files import parse_json, reason_of

# Of a longer text a part does: its tokens would take a hundred times the memory of its bytes.
_MOST_BYTES = 1 << 30


def read_text(path: str | Path) -> str:
    """The text of a .txt file (UTF-8) or the `text` fields of a .jsonl, joined by blank lines. Lines end in LF.

    What is no file (a pipe, /dev/stdin) may have any name: it is read to its end, as a .txt unless it says .jsonl.
    InputError: another suffix, no such file, not UTF-8, no text, too much of it, or (with the line's number) a line
    that is not a JSON object with a string `text`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix not in (".txt", ".jsonl") and not _is_stream(path):
            raise InputError(f"{path}: a text is a .txt file, or a .jsonl file with a `text` field per line")
        data = _read_bytes(path)
        text = data.decode("utf-8-sig")  # -sig: without the byte order mark some editors write
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory here: a part of it will do") from error
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold the other line separators of Unicode (U+2028, U+0085).
        lines = enumerate(text.split("\n"), start=1)
        text = "\n\n".join(_jsonl_text(line, f"{path}, line {n}") for n, line in lines if line.strip())
    if not text.strip():
        raise InputError(f"{path}: has no text")
    return text


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _read_bytes(path: Path) -> bytes:
    """All of it, in parts: a device may have no end, and what is no text shows early."""
    parts, size = [], 0
    # A pipe that nobody writes to has ended, and is not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:
        while part := file.read(1 << 24):
            zero = part.find(b"\0")
            if zero >= 0:
                raise InputError(f"{path}: not a text: byte {size + zero} is zero, as in binary files and in UTF-16")
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise InputError(f"{path}: more than {_MOST_BYTES >> 20} MiB of text: a part of it will do")
    return b"".join(parts)


def _jsonl_text(line: str, place: str) -> str:
    record = parse_json(line, place)
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{place}: no `text` field with a string; a line is {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800": JSON can spell half of a surrogate pair
        raise InputError(f"{place}: `text` is not valid Unicode (character {error.start})") from error
    return text


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids of the whole text, int64 [tokens]: one BOS first where the tokenizer has a BOS, and no EOS.

    A BOS that only the model's configuration names is left out: Qwen's names one that it was not trained with.
    The text is tokenized once, so no window starts with a token that only a cut produced.
    """
    # verbose=False: no warning about the tokenizer's maximum length, since windows are cut afterwards.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:  # the text may spell the BOS out
        ids = [bos, *ids]
    return torch.tensor(ids, dtype=torch.int64)


def spread_windows(tokens: torch.Tensor, samples: int, sequence_length: int, seed: int) -> torch.Tensor:
    """Windows spread over the text `tokens` [tokens]: int64 [samples, sequence_length].

    The possible starts are cut into `samples` equal parts and each part gives one start at random. No two
    windows start at the same token; they overlap only where the text is short. Starts drawn from the whole
    text leave holes: FLAP at 50 % on a 24M Llama, 128 x 512 tokens of WikiText-2, three seeds, has perplexity
    181.4, 185.9, 181.9 with such, and 171.0, 174.7, 174.1 with these. The starts depend on the seed alone, on
    every platform: PCG64's raw stream, which numpy keeps stable across versions (its distributions, like
    torch's, it may change). InputError: fewer than sequence_length + samples - 1 tokens.
    """
    _check_sizes(samples, sequence_length)
    if seed < 0:
        raise InputError(f"the seed is {seed}: it must be 0 or more")
    possible = len(tokens) - sequence_length + 1
    if possible < samples:
        raise InputError(_too_short(len(tokens), samples, sequence_length))
    windows = []
    for i, raw in enumerate(np.random.PCG64(seed).random_raw(samples)):
        low, high = i * possible // samples, (i + 1) * possible // samples
        start = low + int(raw) % (high - low)  # the modulo's bias is below 2⁻³⁰
        windows.append(tokens[start : start + sequence_length])
    return torch.stack(windows)


def _too_short(tokens: int, samples: int, sequence_length: int) -> str:
    longest, most = tokens - samples + 1, tokens - sequence_length + 1
    works = []
    if most >= 1:
        works.append(f"at most {most} x {sequence_length}")
    if longest >= 2:
        works.append(f"at most {samples} x {longest}")
    return (
        f"the text has {tokens} tokens, but {samples} windows of {sequence_length} tokens "
        f"need {sequence_length + samples - 1}: give a longer text"
        + (f" or ask for {' or '.join(works)}" if works else "")
    )


def consecutive_windows(tokens: torch.Tensor, sequence_length: int, max_windows: int | None = None) -> torch.Tensor:
    """The text cut from its start into windows that do not overlap: [windows, sequence_length].

    The incomplete window at the end is left out. InputError: not even one window.
    """
    _check_sizes(1 if max_windows is None else max_windows, sequence_length)
    windows = len(tokens) // sequence_length
    if max_windows is not None:
        windows = min(windows, max_windows)
    if windows == 0:
        raise InputError(
            f"the text has {len(tokens)} tokens, but one window needs {sequence_length}: "
            f"give a longer text or a shorter sequence length"
        )
    return tokens[: windows * sequence_length].view(windows, sequence_length)


def _check_sizes(windows: int, sequence_length: int) -> None:
    if windows < 1:
        raise InputError(f"{windows} windows asked: at least 1 is needed")
    if sequence_length < 2:  # a single token predicts nothing and is predicted by nothing
        raise InputError(f"the sequence length is {sequence_length}: it must be 2 or more")


def check_vocabulary(tokens: torch.Tensor, vocab_size: int) -> None:
    """InputError if a token id lies outside a model's vocabulary: the tokenizer is another model's."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise InputError(
            f"token id {outside} is outside the model's vocabulary of {vocab_size}: "
            f"use the tokenizer that belongs to the model"
        )


def fingerprint(windows: torch.Tensor) -> str:
    """SHA-256, in hex, of the shape and the ids of `windows`, both as little-endian int64."""
    ids = windows.cpu().numpy().astype("<i8")
    return hashlib.sha256(np.array(ids.shape, dtype="<i8").tobytes() + ids.tobytes()).hexdigest()


def sample_from_model(
    model_folder: str | Path,
    samples: int,
    sequence_length: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Windows that the model itself writes: int64 [samples, sequence_length] on the CPU.

    For when there is no text. Each window is BOS (the EOS where the model has no BOS) and then tokens drawn
    from the model at temperature 1; EOS is never drawn, so every window is full. The whole model is loaded,
    unlike in pruning itself. The same seed gives the same windows on the same kind of device with the same
    dtype and library versions; torch's global generators are left as they were. `progress` gets (tokens
    written, tokens in all). InputError: the model has neither BOS nor EOS.
    """
    _check_sizes(samples, sequence_length)
    model = load_model(model_folder, device, dtype, trust_remote_code)
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    first = model.generation_config.bos_token_id
    if first is None:
        if not ends:
            raise InputError(f"{model_folder} names neither BOS nor EOS to start from: give a text")
        first = ends[0]
    # An own configuration, since generate() fills what a given one leaves open from the model's.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=sequence_length,
        suppress_tokens=ends or None,
        pad_token_id=first,  # never written, since nothing ends early; named, so that no warning is printed
    )
    batch = _sampling_batch(model, first, sequence_length)
    windows: list[torch.Tensor] = []
    index = model.device.index or 0
    on_cuda = model.device.type == "cuda"
    generator = torch.cuda.default_generators[index] if on_cuda else torch.default_generator
    with torch.random.fork_rng(devices=[index] if on_cuda else []):
        generator.manual_seed(seed)
        for start in range(0, samples, batch):
            prompt = torch.full((min(batch, samples - start), 1), first, device=model.device)
            report = None
            if progress is not None:
                report = _ProgressStreamer(progress, start * sequence_length, samples * sequence_length)
            written = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=report)
            windows.append(written.cpu())
    return torch.cat(windows)


def _sampling_batch(model: PreTrainedModel, first: int, sequence_length: int) -> int:
    """How many windows to write at once: as many as keep the KV cache below its share of the memory.

    The share, a quarter of a GPU or 4 GiB of main memory, does not depend on what is free at the moment,
    because another batch draws other tokens.
    """
    prompt = torch.full((1, 1), first, device=model.device)
    cache = model(prompt, use_cache=True).past_key_values
    try:
        bytes_per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    except (AttributeError, TypeError):  # a state of another kind, or none: of unknown size
        return 1
    share = 4 << 30
    if model.device.type == "cuda":
        share = torch.cuda.get_device_properties(model.device).total_memory // 4
    return max(1, share // (bytes_per_token * sequence_length))


class _ProgressStreamer(BaseStreamer):
    """generate() hands each step's tokens to a streamer; this one only counts them."""

    def __init__(self, progress: Callable[[int, int], None], done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def put(self, value: torch.Tensor) -> None:
        self.done += value.numel()
        self.progress(self.done, self.total)

    def end(self) -> None:
        pass
