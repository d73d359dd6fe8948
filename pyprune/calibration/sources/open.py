"""Documents of a text, whatever its kind."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from .builtin import BUILTIN, builtin_documents
from .documents import Documents
from .files import file_documents, is_file_name
from .hub import dataset_documents, hub_documents, is_dataset


def open_documents(text: Any, column: str | None = None) -> Documents:
    """Documents of a text.

    A name is a file's where there is one, or where it ends as one; else it is `builtin` or a data set of the hub.

    Args:
        text: a name, a list of documents, or a data set of the library `datasets`.
        column: of rows, that holds the text or the conversation.

    Raises:
        InputError: as `file_documents` and `hub_documents`, or a list with something else than strings.
    """
    if isinstance(text, str | os.PathLike):
        return _named(os.fspath(text), column)
    if is_dataset(text):
        return dataset_documents(text, column)
    return Documents(f"{len(text)} documents", iter(_given(text)))


def _named(name: str, column: str | None) -> Documents:
    if name == BUILTIN:
        return builtin_documents()
    path = Path(name)
    try:
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that no file can have, as reading it says
        there = True
    if there or is_file_name(name) or name.startswith(("/", ".", "~")):
        return file_documents(path, column)
    if "/" in name and path.parent.is_dir():
        raise InputError(f"{name}: no such file (the hub is not asked: {path.parent} is a folder here)")
    return hub_documents(name, column)


def _given(documents: Sequence[Any]) -> list[str]:
    if not all(isinstance(document, str) for document in documents):
        raise InputError("a list of texts has something else than strings in it")
    return [document.replace("\r\n", "\n").replace("\r", "\n") for document in documents]
