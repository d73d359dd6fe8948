"""Reading and writing checkpoints: streaming, whole or not at all."""

from .cache import digest, load_cached, metadata_of, save_cached
from .content import Digests, FileStates, prove_files
from .hub import checkpoint_folder
from .journal import JOURNAL
from .loaded_model import LoadedLayers, LoadedModel
from .model_in_memory import ModelInMemory
from .prefetch import LayerPrefetcher, layer_loader
from .preflight import check_cache, check_disk_space, check_output_creatable, check_output_free
from .reader import CheckpointReader
from .shard_plan import SHARD_SIZE, check_shard_size
from .source import ModelSource
from .unfinished import begun, changes, describe_changes, partial_of
from .writer import CheckpointWriter

__all__ = [
    "JOURNAL",
    "SHARD_SIZE",
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
    "check_shard_size",
    "checkpoint_folder",
    "describe_changes",
    "digest",
    "layer_loader",
    "load_cached",
    "metadata_of",
    "partial_of",
    "prove_files",
    "save_cached",
]
