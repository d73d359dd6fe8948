"""Reading and writing checkpoints: streaming, whole or not at all."""

from .hub import checkpoint_folder
from .reader import CheckpointReader
from .writer import JOURNAL, CheckpointWriter, check_free, check_place, check_space, differences, digest, save_cached

__all__ = [
    "JOURNAL",
    "CheckpointReader",
    "CheckpointWriter",
    "check_free",
    "check_place",
    "check_space",
    "checkpoint_folder",
    "differences",
    "digest",
    "save_cached",
]
