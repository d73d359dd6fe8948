"""Reading and writing checkpoints: streaming, whole or not at all."""

from .cache import digest, save_cached
from .hub import checkpoint_folder
from .loader import LayerLoader
from .places import check_free, check_place, check_space
from .reader import CheckpointReader, stored_model
from .writer import JOURNAL, CheckpointWriter, begun_identity, differences

__all__ = [
    "JOURNAL",
    "CheckpointReader",
    "CheckpointWriter",
    "LayerLoader",
    "begun_identity",
    "check_free",
    "check_place",
    "check_space",
    "checkpoint_folder",
    "differences",
    "digest",
    "save_cached",
    "stored_model",
]
