"""Checkpoints that go wrong only when they run."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def overflowing(model: Path, target: Path, layer: int = 1, matrix: str = "up_proj") -> Path:
    """A copy with one infinite weight in an FFN matrix; in up_proj, the layer's down_proj receives Inf."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        name = f"model.layers.{layer}.mlp.{matrix}.weight"
        if name in tensors:
            tensors[name][7, 3] = torch.inf
            save_file(tensors, file, metadata={"format": "pt"})
    return target
