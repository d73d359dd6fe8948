"""Hessians of other tools that are, for a while, the lower triangle of a bare sum."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.hessian import hessian_finish, hessian_update
from .patching import Calls


class OpenSums:
    """Registry of the Hessians that hold only the lower triangle of Σ x xᵀ, with the factor that each still awaits.

    Tools keep H = s·Σ x xᵀ complete after every update, at two to three passes over H each time (scale, product, add).
    Here H takes products only: it is mirrored and scaled once, in place, before anybody reads it. A Hessian that is
    not open (begun before the block, or copied to another device in between) is brought back to a sum, updated and
    completed, so it is what its tool expects after every call.

    Tensors are told apart by identity and forgotten with their tool's last reference. One thread at a time: whether a
    Hessian is open and what stands in it have to agree.
    """

    def __init__(self, calls: Calls) -> None:
        self._scales = WeakTensorKeyDictionary()
        self._lock = threading.RLock()
        self._calls = calls

    def open(self, hessian: Tensor) -> None:
        """Begin a bare sum in zeros [d, d], float32, contiguous."""
        with self._lock:
            self._scales[hessian] = 1.0

    def add(self, x: Tensor, hessian: Tensor, scale: float, scale_before: float) -> None:
        """Make hessian scale·Σ x xᵀ with the rows of x [..., d] in it, once it is complete.

        scale_before: what the sum without x is multiplied by in a Hessian that is complete now.
        """
        rows = x.detach().to(hessian.device)
        self._calls.count(hessian_updates=1)
        with self._lock:
            if hessian in self._scales:
                hessian_update(rows, hessian, None)
                self._scales[hessian] = scale
                return
            hessian.div_(scale_before)
            hessian_update(rows, hessian, None)
            hessian_finish(hessian, None, 0, scale)

    def complete(self, hessian: Tensor) -> None:
        """Make an open Hessian what its tool expects; any other is left as it is."""
        with self._lock:
            if hessian in self._scales:
                hessian_finish(hessian, None, 0, self._scales.pop(hessian))

    def complete_all(self) -> None:
        """Complete all at the end of the block: the tool may read those that are still alive."""
        # Calibration may have run in inference mode, whose tensors change in it only; in it, every tensor may.
        with self._lock, torch.inference_mode():
            for hessian in list(self._scales):
                self.complete(hessian)
