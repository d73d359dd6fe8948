"""Texts: joined, and tokenized."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import ModelInMemory
from ..errors import InputError
from ..runtime.files import reason_of

if TYPE_CHECKING:  # importing it takes seconds, which `--help` has not
    from transformers import PreTrainedTokenizerBase


def joined_documents(documents: Sequence[str]) -> str:
    """One text of documents, with blank lines between. InputError: no text in them."""
    text = "\n\n".join(documents)
    if not text.strip():
        raise InputError("the documents have no text")
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


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
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
