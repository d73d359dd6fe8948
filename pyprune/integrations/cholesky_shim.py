"""The chain cholesky, cholesky_inverse, cholesky(upper=True) of GPTQ and SparseGPT, answered by one factorisation.

Tools write the chain inside long functions. `FactorisingTorch` stands for `torch` in such a function alone: the first
step computes the factor of the inverse that the third one would return, the second passes it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import spd_inverse_factor
from .patching import Calls


@dataclass(frozen=True)
class PendingFactor:
    """Result of the first two steps: no tensor, so that any use but the next step fails. factor: [d, d]."""

    factor: Tensor


def checked_factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """(U, failed) for symmetric h [d, d] float32: UᵀU = h^-1, U upper triangular; failed: bool scalar on h's device.

    failed says what any of the three factorisations would have: h is not positive definite, or its inverse overflows.
    spd_inverse_factor cuts a channel off where h_jj = 0; h is singular then, which the tools have their own answers to.
    """
    factor, info = spd_inverse_factor(h, 0.0)
    # ‖U_·j‖² = (h^-1)_jj: where that overflows, the tools' second Cholesky fails.
    finite = torch.linalg.vector_norm(factor, dim=0).isfinite().all()
    return factor, (info != 0) | ~finite | (h.diagonal() == 0).any()


class FactorisingLinalg:
    """torch.linalg, but for the first and the last step of the chain."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.linalg, name)

    def cholesky(self, h: Tensor | PendingFactor, *, upper: bool = False) -> Tensor | PendingFactor:
        """First step: raises LinAlgError where the chain would. Last step, of a pending factor: the factor."""
        if isinstance(h, PendingFactor):
            if not upper:
                raise TypeError("the factor of an inverse is upper triangular")
            return h.factor
        if upper:
            return torch.linalg.cholesky(h, upper=True)
        pending, info = self.cholesky_ex(h)
        if info.item():
            raise torch.linalg.LinAlgError("the matrix is not positive definite")
        return pending

    def cholesky_ex(self, h: Tensor, *, check_errors: bool = False) -> tuple[PendingFactor, Tensor]:
        """First step; info: int32 scalar, 0 where the chain would succeed."""
        if check_errors:
            raise TypeError("use cholesky to have errors checked")
        factor, failed = checked_factor(h)
        self._calls.count(inverse_factors=1)
        return PendingFactor(factor), failed.to(torch.int32)


class FactorisingTorch:
    """torch, but for the three steps of the chain."""

    def __init__(self, calls: Calls) -> None:
        self.linalg = FactorisingLinalg(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cholesky_inverse(self, h: Any, *arguments: Any, **options: Any) -> Any:
        """Second step: a pending factor stays one, and `out` is not written."""
        return h if isinstance(h, PendingFactor) else torch.cholesky_inverse(h, *arguments, **options)
