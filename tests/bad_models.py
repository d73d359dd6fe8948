"""Checkpoints that go wrong only when they run."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def overflowing(model: Path, target: Path) -> Path:
    """A copy whose layer 1 has an infinite weight in up_proj: its down_proj receives Inf."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        name = "model.layers.1.mlp.up_proj.weight"
        if name in tensors:
            tensors[name][7, 3] = torch.inf
            save_file(tensors, file, metadata={"format": "pt"})
    return target
