"""Compensation biases: their bits do not follow from where a weight lies."""

import torch

from pyprune.passes.rewrite import compensation_bias


def test_bias_does_not_depend_on_alignment() -> None:
    """Tensors of a file lie at any multiple of their element's size, those of a loaded model at multiples of 64."""
    generator = torch.Generator().manual_seed(0)
    weight, mean = torch.randn(64, 160, generator=generator), torch.randn(160, generator=generator)
    kept, memory = torch.tensor([0, 3, 4]), torch.empty(weight.numel() + 16)
    expected = compensation_bias(weight, mean, kept, 20)
    exact = weight.double() @ mean.double().index_fill(0, torch.tensor([*range(20), *range(60, 100)]), 0)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-5)
    for offset in range(16):
        moved = memory[offset : offset + weight.numel()].view_as(weight).copy_(weight)
        assert torch.equal(compensation_bias(moved, mean, kept, 20), expected), offset
