"""What a run wrote, for comparisons."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def checkpoint_bytes(folder: Path) -> dict[str, bytes]:
    """Tensor files, their index if there is one, and the configuration."""
    names = ("config.json", "model.safetensors.index.json")
    files = [*folder.glob("*.safetensors"), *(folder / name for name in names if (folder / name).exists())]
    return {file.name: file.read_bytes() for file in files}


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
