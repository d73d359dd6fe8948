"""Small files: JSON read in one place, written whole or not at all; and file names."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from ..errors import InputError


def read_json(path: Path) -> Any:
    """The document in a JSON file.

    Raises:
        InputError: naming the file, which cannot be read, or as `parse_json`.
    """
    return parse_json(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """The bytes of a file: no pipe, which may wait for ever, and no device, which may have no end.

    Raises:
        InputError: naming the path; there is no such file, or it cannot be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise InputError(f"{path}: not a file")
            return f.read()
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error


def parse_json(data: bytes | str, where: str) -> Any:
    """The document in UTF-8 text.

    Raises:
        InputError: naming `where`; not UTF-8, not JSON, or nested deeper than Python follows.
    """
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise InputError(f"{where}: not valid JSON (nested too deep)") from error
    except (ValueError, MemoryError) as error:
        raise InputError(f"{where}: not valid JSON ({error or 'too large'})") from error


def reason_of(error: BaseException) -> str:
    """Return an error's message in one line; for a system error, the system's words."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def write_json(document: Any, path: Path) -> None:
    """Write a JSON file, whole or not at all: at any moment there is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def stem_of(name: str) -> str:
    """A device's name as a file's: small letters and digits, other characters as single dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
