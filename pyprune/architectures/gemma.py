"""Gemma 1: norms times 1 + w, embeddings times the root of the hidden size."""

from typing import Any

from torch import Tensor

from .declaration import RMS_PLUS_ONE, Scales
from .family import Family


def scaled_by_root(config: Any, rows: Tensor) -> Tensor:
    """The embeddings' rows times √hidden_size, itself rounded to their type."""
    return rows * rows.new_tensor(config.hidden_size**0.5)


GEMMA = Family(name="gemma", prefix="Gemma", norm=RMS_PLUS_ONE, scales=Scales(embed=scaled_by_root))
