"""Checks of the tensors outside the layers: embeddings, final norm, head."""

import torch
from torch import Tensor

from ..checkpoint import ModelSource
from ..checkpoint.finite import check_finite, described_rows, nonfinite_rows
from ..errors import InputError


def nonfinite_embeddings(reader: ModelSource) -> list[int]:
    """Rows of untied embeddings that hold NaN or Inf. InputError: NaN or Inf elsewhere outside the layers."""
    rows: list[int] = []
    for name, tensor in reader.read_outside().items():
        if name == reader.family.embeddings and not reader.tied:
            rows = nonfinite_rows(tensor)
        else:
            check_finite({name: tensor}, str(reader.origin))
    return rows


def check_rows_unused(reader: ModelSource, rows: list[int], *windows: Tensor | None) -> str:
    """A warning that names the rows. InputError: one of them is the embedding of a token in the windows."""
    name, bad = reader.family.embeddings, torch.tensor(rows)
    for ids in windows:
        used = bad[torch.isin(bad, ids)] if ids is not None else bad[:0]
        if len(used):
            raise InputError(
                f"{reader.origin}: tensor {name}: NaN or Inf weights in the rows of tokens that the text has: "
                f"{described_rows(used.tolist())}; check the checkpoint"
            )
    return f"{name}: NaN or Inf in rows of tokens that no text has: {described_rows(rows)}"
