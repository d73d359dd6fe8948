"""The journal of an unfinished output: one JSON document a line, each with a digest of itself."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from ..errors import InputError
from ..runtime.files import parse_json, read_file

JOURNAL = "journal.jsonl"
FORMAT = "pyprune-journal-2"  # in the first line; the first format, of a file a layer, had none
_DIGEST = "digest"


def journal_line(document: dict[str, Any]) -> str:
    """A line of the journal, its end included."""
    return json.dumps(document | {_DIGEST: _digest(document)}) + "\n"


def read_journal(file: Path) -> list[dict[str, Any]]:
    """Read the journal's documents; a last line without an end is one that a killed run did not finish.

    Raises:
        InputError: naming the file and the line that is none of pyprune's, or was changed.
    """
    lines = read_file(file).split(b"\n")
    documents = []
    for number, line in enumerate(lines[:-1], start=1):
        where = f"{file}, line {number}"
        try:
            document = parse_json(line, where)
            digest = document.pop(_DIGEST)
            intact = digest == _digest(document)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:  # InputError is one
            raise InputError(f"{where}: not a journal of pyprune; delete {file.parent}") from error
        if not intact:
            raise InputError(f"{where}: not what a run wrote there; delete {file.parent}")
        documents.append(document)
    return documents


def rewrite_journal(journal: Path, documents: Iterable[dict[str, Any]]) -> None:
    """Replace the journal, if there is one, by another; on return it has reached the disk."""
    temporary = journal.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.writelines(journal_line(document) for document in documents)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(journal)


def append_to_journal(journal: Path, document: dict[str, Any]) -> None:
    """Add a line, which has reached the disk on return. OSError, with the file's name: no part of it stays."""
    with journal.open("ab", buffering=0) as f:
        before = f.tell()
        rest = memoryview(journal_line(document).encode())
        try:
            while rest:
                rest = rest[f.write(rest) :]
            os.fsync(f.fileno())
        except OSError as error:
            f.truncate(before)  # half a line would spoil the one that follows it
            raise OSError(error.errno, error.strerror, str(journal)) from error


def _digest(document: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
