"""A small model and a short text for commands."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], demo_model: Path) -> Path:
    return tiny_checkpoint(family="llama", dtype="float32", tokenizer=demo_model)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """In the test's own folder, as some tests look at all of it."""
    path = tmp_path / "text.txt"
    path.write_text("A plain text about nothing in particular. " * 60)
    return path
