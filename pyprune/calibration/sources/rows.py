"""The document of a row: the string of a column, or a conversation."""

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from .documents import Document, Message

# Looked for in this order where no column is named.
COLUMNS = ("text", "messages", "conversations")
# Roles of ShareGPT's spelling, {"from": ..., "value": ...}; its `system` and others are spelled as everywhere.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class RowReader:
    """Takes the document out of each row. All rows have it in one column: the first row decides where none is named."""

    def __init__(self, column: str | None = None) -> None:
        self.column = column
        self.kind: type | None = None

    def choose(self, names: list[str], place: str) -> str:
        """Choose the column among those of a table. InputError: the named one, or each that is looked for, is absent.

        The column of a table is known before its first row, so that others need not be read.
        """
        wanted = COLUMNS if self.column is None else (self.column,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise InputError(f"{place}: {self._missing(names)}")
        self.column = found
        return found

    def document(self, row: Any, place: str) -> Document:
        """The document of a row. InputError: naming the place; the column is absent or holds something else."""
        if not isinstance(row, Mapping):
            raise InputError(f'{place}: no `text` field with a string; a row is {{"text": "..."}}')
        if self.column is None:
            found = next((name for name in COLUMNS if isinstance(row.get(name), str | list)), None)
            if found is None:
                raise InputError(f"{place}: {self._missing(list(row))}")
            self.column = found
        value = row.get(self.column)
        if not isinstance(value, str | list):
            raise InputError(f"{place}: {self._missing(list(row))}")
        if self.kind not in (None, type(value)):
            raise InputError(f"{place}: `{self.column}` mixes strings and conversations: all rows are of one kind")
        self.kind = type(value)
        return (
            _valid(value, f"{place}: `{self.column}`") if isinstance(value, str) else self._conversation(value, place)
        )

    def _missing(self, names: list[Any]) -> str:
        there = ", ".join(f"`{name}`" for name in names if name is not None) or "no columns"
        if self.column is None:
            return f"no `text` field with a string, and no `messages`; it has {there}: name one with --text-column"
        what = "is not a string or a conversation" if self.column in names else "is missing"
        return f"no `{self.column}` field: it {what}; the row has {there}"

    def _conversation(self, value: list[Any], place: str) -> list[Message]:
        messages = [_message(each) for each in value]
        if not messages or None in messages:
            raise InputError(
                f"{place}: `{self.column}` is no conversation, a list of "
                '{"role": "...", "content": "..."} or {"from": "...", "value": "..."}'
            )
        return [message for message in messages if message is not None]


def _message(given: Any) -> Message | None:
    """A message with `role` and `content`; None for what is none. Parquet fills absent fields with None: left out."""
    if not isinstance(given, Mapping):
        return None
    if isinstance(given.get("from"), str) and isinstance(given.get("value"), str):
        return {"role": _SHAREGPT_ROLES.get(given["from"], given["from"]), "content": given["value"]}
    if not isinstance(given.get("role"), str):
        return None
    return {name: value for name, value in given.items() if value is not None}


def _valid(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800": JSON can spell half of a surrogate pair
        raise InputError(f"{what} is not valid Unicode (character {error.start})") from error
    return text
