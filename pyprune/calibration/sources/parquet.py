"""Documents of a Parquet file, by pyarrow (extra `pyprune[data]`)."""

import io
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ...runtime.files import reason_of
from .documents import Document
from .rows import RowReader


def parquet_documents(data: bytes, rows: RowReader, path: Path) -> Iterator[Document]:
    """Yield the document of each row; other columns are not decoded.

    Raises:
        InputError: pyarrow is absent, the file is not Parquet, or as `RowReader`.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install 'pyprune[data]'") from error
    if not data:
        raise InputError(f"{path}: has no text")
    try:
        file = ParquetFile(io.BytesIO(data))
        column = rows.choose(list(file.schema_arrow.names), str(path))
        number = 0
        for batch in file.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                number += 1
                yield rows.document(row, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a whole Parquet file ({reason_of(error)})") from error
