"""Reading and writing checkpoints: streaming, whole or not at all."""

from .hub import checkpoint_folder
from .reader import CheckpointReader
from .writer import CheckpointWriter, check_free, check_space

__all__ = ["CheckpointReader", "CheckpointWriter", "check_free", "check_space", "checkpoint_folder"]
