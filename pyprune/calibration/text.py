"""Texts: read from files, and tokenized."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..checkpoint import ModelInMemory
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


def joined_documents(documents: Sequence[str]) -> str:
    """One text of a caller's documents, with blank lines between, as the lines of a .jsonl.

    Raises:
        InputError: no text in them.
    """
    if not all(isinstance(document, str) for document in documents):
        raise InputError("a list of texts has something else than strings in it")
    text = "\n\n".join(documents).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InputError("the documents have no text")
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


def load_tokenizer(folder: Path | ModelInMemory, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, or of a model in memory. InputError: there is none, or it does not load."""
    if isinstance(folder, ModelInMemory):
        if folder.tokenizer is None:
            raise InputError(f"{folder}: no tokenizer came with it: give `tokenizer=`, or texts as token ids")
        return folder.tokenizer
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


def check_vocabulary(tokens: torch.Tensor, vocab_size: int) -> None:
    """InputError if a token id lies outside a model's vocabulary: the tokenizer is another model's."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise InputError(
            f"token id {outside} is outside the model's vocabulary of {vocab_size}: "
            f"use the tokenizer that belongs to the model"
        )
