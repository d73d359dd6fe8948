"""Documents of a file: .txt, .jsonl, .json, .csv, .parquet, each also .gz."""

import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ...errors import InputError
from ...runtime.files import parse_json, reason_of
from .documents import Document, Documents
from .rows import RowReader

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
# Of a longer text a part does: its tokens would take a hundred times the memory of its bytes.
MOST_BYTES = 1 << 30


def is_file_name(name: str) -> bool:
    """Whether a name ends as a file of text does."""
    return _suffix(Path(name))[0] in SUFFIXES


def file_documents(path: Path, column: str | None = None) -> Documents:
    """Documents of a file: a .txt is one document, other files have one in each row. Lines end in LF.

    What is no file (a pipe, /dev/stdin) may have any name: it is read to its end, as a .txt unless its suffix differs.

    Args:
        path: of the file.
        column: that holds the text or the conversation; None: `text`, else `messages` or `conversations`.

    Raises:
        InputError: another suffix, no such file, not UTF-8, no text, too much of it, or (with the place) a row
            without a document.
    """
    suffix, packed = _suffix(path)
    try:
        if suffix not in SUFFIXES and not _is_stream(path):
            if not path.exists():
                raise InputError(f"{path}: no such file")
            raise InputError(f"{path}: a text is a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or one with .gz")
        data = _read_bytes(path, packed, binary=suffix == ".parquet")
        rows = RowReader(column)
        if suffix == ".parquet":
            from .parquet import parquet_documents

            documents = list(parquet_documents(data, rows, path))
        else:
            documents = list(_text_documents(_decoded(data, path), suffix, rows, path))
    except MemoryError as error:
        raise InputError(f"{path}: too large for the memory here: a part of it will do") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise InputError(f"{path}: has no text")
    return Documents(str(path), iter(documents))


def _suffix(path: Path) -> tuple[str, bool]:
    """The suffix in small letters, without .gz, and whether that was there."""
    packed = path.suffix.lower() == ".gz"
    return (path.with_suffix("") if packed else path).suffix.lower(), packed


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _read_bytes(path: Path, packed: bool, binary: bool) -> bytes:
    """All of it, in parts: a device may have no end, and what is no text shows early."""
    parts, size = [], 0
    # A pipe that nobody writes to has ended, and is not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:
        for part in _parts(gzip.GzipFile(fileobj=file) if packed else file, path):
            zero = -1 if binary else part.find(b"\0")
            if zero >= 0:
                raise InputError(f"{path}: not a text: byte {size + zero} is zero, as in binary files and in UTF-16")
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise InputError(f"{path}: more than {MOST_BYTES >> 20} MiB of text: a part of it will do")
    return b"".join(parts)


def _parts(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    try:
        while part := file.read(1 << 24):
            yield part
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({reason_of(error)})") from error


def _decoded(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")  # -sig: without the byte order mark some editors write
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text_documents(text: str, suffix: str, rows: RowReader, path: Path) -> Iterator[Document]:
    if suffix == ".csv":
        yield from _csv_documents(text, rows, path)
    elif suffix == ".json" and text.lstrip().startswith("["):
        yield from _array_documents(parse_json(text, str(path)), rows, path)
    elif suffix in (".json", ".jsonl"):
        # Not splitlines(): JSON strings may hold the other line separators of Unicode (U+2028, U+0085).
        for number, line in enumerate(text.split("\n"), start=1):
            place = f"{path}, line {number}"
            if line.strip():
                yield rows.document(parse_json(line, place), place)
    else:
        yield text


def _array_documents(array: list[Any], rows: RowReader, path: Path) -> Iterator[Document]:
    """Rows of a JSON array; a string is a row by itself."""
    for number, row in enumerate(array, start=1):
        yield rows.document({"text": row} if isinstance(row, str) else row, f"{path}, row {number}")


def _csv_documents(text: str, rows: RowReader, path: Path) -> Iterator[Document]:
    """Rows below the header. The limit of a field is the module's: it is put back."""
    limit = csv.field_size_limit(MOST_BYTES)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if text.strip():
            rows.choose(list(reader.fieldnames or ()), f"{path}, line 1")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise InputError(f"{place}: more fields than the header has columns")
            yield rows.document(row, place)
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV near line {reader.line_num} ({error})") from error
    finally:
        csv.field_size_limit(limit)
