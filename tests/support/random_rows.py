"""Random rows for the operators that sum over rows."""

import torch
from torch import Tensor


def normal(rows: int, channels: int, dtype: torch.dtype, device: str = "cpu", mean: float = 0.0) -> Tensor:
    """Drawn on the device."""
    generator = torch.Generator(device).manual_seed(rows * 1_000_003 + channels)
    return (torch.randn(rows, channels, generator=generator, device=device) + mean).to(dtype)


def with_offsets(rows: int, channels: int, dtype: torch.dtype, device: str, largest: float) -> Tensor:
    """The same on every device; the channels' means are 0 to `largest` standard deviations."""
    generator = torch.Generator().manual_seed(rows * 100_003 + channels)
    offsets = torch.linspace(0, largest, channels)
    return (torch.randn(rows, channels, generator=generator) + offsets).to(device, dtype)
