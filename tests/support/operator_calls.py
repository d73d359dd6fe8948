"""Calls of the operators by their schemas, and views that lie in memory as callers' may."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.operator_cases import CASES


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator of pyprune, its tensors as they were before it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "pyprune":
            copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
            self.calls.setdefault(func, []).append((copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def recorded_calls() -> dict[Any, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The first call of every registered operator that the cases make: positional and other arguments."""
    with Recorder() as recorder:
        for case in CASES.values():
            case.run(*case.inputs())
    return {operator: calls[0] for operator, calls in recorder.calls.items()}


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of memory that is NaN elsewhere, or another index."""
    between = torch.nan if x.is_floating_point() else 1 << 20
    memory = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), between, dtype=x.dtype)
    view = memory[..., 1 : 1 + 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view
