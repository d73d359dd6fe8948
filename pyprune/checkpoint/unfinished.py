"""Unfinished output: the folder beside the output, and the parts of a killed run in it that are intact."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime.faults import is_limit
from .content import digests_of_files
from .headers import StoredTensor, read_header
from .journal import FORMAT, JOURNAL, read_journal

logger = logging.getLogger(__name__)
WEIGHTS = "model*.safetensors"
# Of a part's line, what is read of it again.
_ENTRY = {"part": int, "checksums": dict, "tensor_bytes": int, "sources": dict, "record": object}


def partial_of(output: Path) -> Path:
    """The folder beside `output` in which it is made."""
    output = output.resolve()
    return output.with_name(output.name + ".partial")


def begun(output: Path) -> dict[str, Any]:
    """The first document of an unfinished run's journal, `identity` and `source`; empty where there is none."""
    journal = partial_of(output) / JOURNAL
    if not journal.exists():
        return {}
    first, *_ = [*read_journal(journal), {}]
    if first:
        _check_format(first, journal.parent)
    kinds = [first.get(name) for name in ("identity", "source")]
    return first if all(isinstance(kind, dict) for kind in kinds) else {}


def restore(partial: Path, head: dict[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Read what a killed run left: the journal's head, and its entries of parts that are still there, by part.

    head: that of a run that begins here; where the killed one came to none it is returned.

    Raises:
        InputError: the folder is not an unfinished run's, or one of other settings.
    """
    journal = partial / JOURNAL
    if not journal.exists() and any(file.suffix != ".tmp" for file in partial.iterdir()):
        raise InputError(f"{partial}: not an unfinished run of pyprune: no {JOURNAL} there; delete that folder")
    first, *entries = (read_journal(journal) if journal.exists() else []) or [head]
    _check_format(first, partial)
    try:
        changed = describe_changes(first["identity"], head["identity"])
        if changed:
            raise InputError(
                f"{partial}: cannot resume with other settings: {changed}; "
                "repeat the first command, or delete that folder"
            )
        for entry in entries:
            if any(not isinstance(entry[name], kind) for name, kind in _ENTRY.items()):
                raise TypeError(f"an entry has other types than {sorted(_ENTRY)}")
        written = {entry["part"]: entry for entry in entries}  # of a part that was written again the last one
        stored = _stored(partial) if written else {}
        return first, {part: entry for part, entry in written.items() if _intact(entry, stored)}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{journal}: not a journal of pyprune ({error!r}); delete {partial}") from error


def _check_format(head: dict[str, Any], partial: Path) -> None:
    if head.get("format") != FORMAT:
        raise InputError(f"{partial}: begun by another version of pyprune; delete that folder to start anew")


def _stored(partial: Path) -> dict[str, StoredTensor]:
    """Places of the tensors in the files that are there and whole."""
    stored: dict[str, StoredTensor] = {}
    for file in sorted(partial.glob(WEIGHTS)):
        try:
            stored |= read_header(file)
        except (InputError, OSError) as error:
            if is_limit(error):
                raise
            logger.warning("%s: damaged since it was written (%s); it is made anew", file, error)
    return stored


def _intact(entry: dict[str, Any], stored: Mapping[str, StoredTensor]) -> bool:
    """Return whether a part is there, with the digests that its tensors had in memory."""
    checksums = entry["checksums"]
    if not checksums.keys() <= stored.keys():
        return False
    try:
        found = digests_of_files({name: stored[name] for name in checksums})
    except OSError as error:
        if is_limit(error):
            raise
        found = {}
    damaged = next((name for name in checksums if found.get(name) != checksums[name]), None)
    if damaged is not None:
        file = stored[damaged].file
        logger.warning("%s: tensor %s was damaged since it was written; it is made anew", file, damaged)
    return damaged is None


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The entries of two identities that differ, each with both values, for people."""
    return {
        key: f"{key} (was {before.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the entries in which two identities differ; empty if there are none."""
    return "; ".join(changes(before, now).values())
