"""Reading and writing checkpoints: streaming, whole or not at all."""

from .cache import digest, load_cached, metadata_of, save_cached
from .content import Digests, FileStates
from .hub import checkpoint_folder
from .journal import JOURNAL
from .loaded_model import LoadedLayers, LoadedModel
from .model_in_memory import ModelInMemory
from .prefetch import LayerPrefetcher, layer_loader
from .preflight import check_cache, check_disk_space, check_output_creatable, check_output_free
from .reader import CheckpointReader
from .source import ModelSource
from .writer import CheckpointWriter, begun, changes, describe_changes, prove_files

__all__ = [
    "JOURNAL",
    "CheckpointReader",
    "CheckpointWriter",
    "Digests",
    "FileStates",
    "LayerPrefetcher",
    "LoadedLayers",
    "LoadedModel",
    "ModelInMemory",
    "ModelSource",
    "begun",
    "changes",
    "check_cache",
    "check_disk_space",
    "check_output_creatable",
    "check_output_free",
    "checkpoint_folder",
    "describe_changes",
    "digest",
    "layer_loader",
    "load_cached",
    "metadata_of",
    "prove_files",
    "save_cached",
]
