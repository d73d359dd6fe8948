"""Weights that are NaN or Inf, named before anything is made of them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import InputError

# Rows of a table that are looked at together: what is in float32 at a time.
_ROWS = 8192


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check every tensor once, in its stored type; on a device with a single wait for it.

    where: what they belong to, for the error.

    Raises:
        InputError: naming the tensor and the first place of NaN or Inf in it.
    """
    if not tensors:
        return
    # A sum is finite only if all of its terms are. One that overflows is looked into, and found innocent.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors.values()])
    for name, total in zip(tensors, sums.isfinite().tolist(), strict=True):
        if not total:
            _check_each(tensors[name], f"{where}: tensor {name}")


def _check_each(tensor: Tensor, what: str) -> None:
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        place = bad[0].tolist()
        value = tensor[tuple(place)].item()
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(f"{what} has {value} at {place}{more}: NaN or Inf weights; check the checkpoint")


def nonfinite_rows(table: Tensor) -> list[int]:
    """Numbers of the rows of a table [rows, n] that hold NaN or Inf."""
    rows: list[int] = []
    for first in range(0, len(table), _ROWS):
        part = table[first : first + _ROWS]
        if not bool(part.sum(dtype=torch.float32).isfinite()):
            bad = (~torch.isfinite(part)).any(dim=1).nonzero().flatten()
            rows += (bad + first).tolist()
    return rows


def described_rows(rows: Iterable[int]) -> str:
    """The first of some numbers, and how many more there are."""
    first, *more = rows
    return f"{first}" + (f" and {len(more)} more" if more else "")
