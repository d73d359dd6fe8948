"""Texts for tests: plain sentences of a vocabulary that every tokenizer here has, and what a file holds."""

from pathlib import Path

from pyprune.calibration.sources.files import file_documents
from pyprune.calibration.text import joined_documents


def harvest(sentences: int = 400) -> str:
    return "".join(f"In the year {n} the harvest was {n % 7} times as good. " for n in range(sentences))


def read_text(path: str | Path) -> str:
    """The text of a file, its documents joined by blank lines."""
    return joined_documents([document for document in file_documents(Path(path)) if isinstance(document, str)])
