"""Checkpoints with damaged weights, and ones that go wrong only when they run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def overflowing(model: Path, target: Path) -> Path:
    """A copy with finite weights whose channel 7 of layer 1's down_proj receives Inf at every token.

    One huge weight in up_proj reads a channel that the norm before it makes large. An eighth of the largest number:
    so that a refit of the weight itself stays finite.
    """

    def enlarge(norm: Tensor) -> None:
        norm[3] = 1e7

    def fill(weight: Tensor) -> None:
        weight[7, 3] = torch.finfo(weight.dtype).max / 8

    changed(model, target, "model.layers.1.post_attention_layernorm.weight", enlarge)
    return changed(target, target, "model.layers.1.mlp.up_proj.weight", fill)


def infinite(model: Path, target: Path, name: str, value: float = torch.inf) -> Path:
    """A copy with one weight NaN or Inf in the tensor of that name."""

    def fill(weight: Tensor) -> None:
        weight.view(-1)[weight.numel() // 2] = value

    return changed(model, target, name, fill)


def changed(model: Path, target: Path, name: str, change: Callable[[Tensor], None]) -> Path:
    """A copy with one tensor changed in place."""
    if model != target:
        shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
    return target
