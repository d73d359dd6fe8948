"""Reading and writing checkpoints: streaming, whole or not at all."""

from .cache import digest, load_cached, metadata_of, save_cached
from .content import Digests, FileStates
from .hub import checkpoint_folder
from .journal import JOURNAL
from .prefetch import LayerLoader
from .preflight import check_cache, check_free, check_place, check_space
from .reader import CheckpointReader, stored_model
from .writer import CheckpointWriter, begun, changes, differences, prove_files

__all__ = [
    "JOURNAL",
    "CheckpointReader",
    "CheckpointWriter",
    "Digests",
    "FileStates",
    "LayerLoader",
    "begun",
    "changes",
    "check_cache",
    "check_free",
    "check_place",
    "check_space",
    "checkpoint_folder",
    "differences",
    "digest",
    "load_cached",
    "metadata_of",
    "prove_files",
    "save_cached",
    "stored_model",
]
