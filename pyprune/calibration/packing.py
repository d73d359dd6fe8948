"""Packing: documents to token ids, one after another or each from a window's start."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..runtime.files import reason_of
from .sources.documents import Document, Message
from .text import joined_documents, refused_by_tokenizers, tokenize

if TYPE_CHECKING:  # importing it takes seconds, which `--help` has not
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Token ids of documents by the tokenizer of a model; `model`: its name in messages."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", model: str) -> None:
        self.tokenizer, self.model = tokenizer, model

    def ids(self, document: Document) -> list[int]:
        """Token ids of one document: what the tokenizer or its chat template gives, BOS and EOS included.

        Raises:
            InputError: there is no chat template, or it or the tokenizer refuses the document.
        """
        if isinstance(document, str):
            with refused_by_tokenizers(f"{self.model}: its tokenizer cannot encode the text"):
                # verbose=False: no warning about the tokenizer's maximum length, since windows are cut afterwards.
                return list(self.tokenizer(document, verbose=False).input_ids)
        return self._conversation_ids(document)

    def length(self, text: str) -> int:
        """Tokens of a text without BOS and EOS."""
        with refused_by_tokenizers(f"{self.model}: its tokenizer cannot encode the text"):
            return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _conversation_ids(self, document: list[Message]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{self.model}: its tokenizer has no chat template for conversations: name a column with text "
                "by --text-column"
            )
        from jinja2 import TemplateError

        try:
            ids = self.tokenizer.apply_chat_template(
                document, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"{self.model}: its chat template refuses the conversation that begins {document[0]!r:.80} "
                f"({reason_of(error)})"
            ) from error
        return list(ids)


def concatenated(documents: Iterable[Document], encoder: Encoder, enough: int | None) -> Tensor:
    """Token ids of documents one after another, int64 [tokens].

    Strings are joined by blank lines and tokenized once, as `tokenize`: one BOS first and no EOS. Conversations keep
    the ids of the chat template.

    Args:
        documents: strings or conversations; not both.
        encoder: of the model.
        enough: tokens after which no more documents are taken, and at which the text ends; None: all.
    """
    texts: list[str] = []
    ids: list[int] = []
    count = 0
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
            count += 0 if enough is None else encoder.length(document)
        else:
            ids += encoder.ids(document)
            count = len(ids)
        if enough is not None and count >= enough:
            break
    if not texts:
        return torch.tensor(ids, dtype=torch.int64)[:enough]
    with refused_by_tokenizers(f"{encoder.model}: its tokenizer cannot encode the text"):
        return tokenize(joined_documents(texts), encoder.tokenizer)[:enough]


def separated(documents: Iterable[Document], encoder: Encoder, length: int, most: int | None) -> Tensor:
    """Windows that each begin with a document, int64 [windows, length].

    Documents follow one another until the window is full. The rest of the last one is left out, and the next window
    begins with the next document. Empty documents are left out, as is an incomplete window at the end.

    Args:
        documents: strings or conversations.
        encoder: of the model.
        length: tokens in a window.
        most: windows after which no more documents are taken; None: all.
    """
    windows = list(_separate_windows(documents, encoder, length, most))
    return torch.tensor(windows, dtype=torch.int64).view(len(windows), length)


def _separate_windows(
    documents: Iterable[Document], encoder: Encoder, length: int, most: int | None
) -> Iterator[list[int]]:
    window: list[int] = []
    made = 0
    for document in documents:
        if isinstance(document, str) and not document.strip():
            continue
        window += encoder.ids(document)[: length - len(window)]
        if len(window) == length:
            yield window
            window, made = [], made + 1
            if made == most:
                return
