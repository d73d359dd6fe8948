"""The journal of an unfinished output: one JSON document a line, each with a digest of itself."""

import json
from pathlib import Path
from typing import Any

import xxhash

from ..errors import InputError
from ..runtime.files import parse_json, read_file

JOURNAL = "journal.jsonl"
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


def _digest(document: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(document, sort_keys=True).encode())
