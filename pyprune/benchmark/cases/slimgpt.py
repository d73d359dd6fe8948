"""SlimGPT's choice of channels (arXiv 2412.18110) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(hessian: Tensor) -> Tensor:
    """Invert by torch's Cholesky; the result is contiguous or stored by columns, as the library has it."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def group_sizes(count: int) -> list[int]:
    """SlimGPT's dynamic groups: columns that each step removes."""
    sizes: list[int] = []
    size = (count - 512) // 2
    while (rest := count - sum(sizes)) > 0:
        sizes.append(min(rest, max(size, 64), 1024))
        size = (size - 512) // 2
    return sizes


class SlimGpt:
    """SlimGPT's loop: what is left of H, its inverse, W and the channels after the steps so far."""

    def __init__(self, hessian: Tensor, first_inverse: Tensor, weight: Tensor) -> None:
        self.hessian, self.inverse, self.weight = hessian, first_inverse, weight
        self.channels = torch.arange(len(hessian), device=hessian.device)

    def step(self, size: int, last: bool) -> None:
        """Remove `size` columns, refit the others, and, unless it was the last step, invert their Hessian."""
        scores = self.weight.square().sum(0) / self.inverse.diagonal()
        order = scores.argsort()
        removed, kept = order[:size], order[size:].sort().values
        rows = self.inverse[removed]  # [n, d]
        factor = torch.linalg.cholesky(rows[:, removed])
        coefficients = torch.cholesky_solve(self.weight[:, removed].T, factor)  # [n, out]
        self.weight = self.weight[:, kept].addmm_(coefficients.T, rows[:, kept], alpha=-1)
        self.channels = self.channels[kept]
        if not last:
            del self.inverse
            self.hessian = self.hessian[kept][:, kept]
            self.inverse = inverse(self.hessian)

    def run(self, count: int) -> None:
        sizes = group_sizes(count)
        for number, size in enumerate(sizes, start=1):
            self.step(size, number == len(sizes))
