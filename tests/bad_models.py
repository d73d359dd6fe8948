"""Checkpoints with damaged weights, and ones that go wrong only when they run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def overflowing(model: Path, target: Path) -> Path:
    """A copy with the largest finite weights in row 7 of layer 1's up_proj: channel 7 of down_proj's input is Inf."""

    def fill(weight: Tensor) -> None:
        weight[7] = torch.finfo(weight.dtype).max

    return changed(model, target, "model.layers.1.mlp.up_proj.weight", fill)


def infinite(model: Path, target: Path, name: str, value: float = torch.inf) -> Path:
    """A copy with one weight NaN or Inf in the tensor of that name."""

    def fill(weight: Tensor) -> None:
        weight.view(-1)[weight.numel() // 2] = value

    return changed(model, target, name, fill)


def changed(model: Path, target: Path, name: str, change: Callable[[Tensor], None]) -> Path:
    """A copy with one tensor changed in place."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
    return target
