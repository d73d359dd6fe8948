"""SparseGPT's walk over the columns of a weight: single weights to zero, the rest of their row makes up for them.

The operator is `pyprune::sparsify_`; `sparsify_reference` says in plain PyTorch what it computes (Frantar & Alistarh,
arXiv 2301.00774, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import WIDE, check_apart, check_kind
from .declaration import Kernel, Operator
from .dispatch import choose_launch
from .moments import as_rows
from .precision import exact_float32
from .requirements import AMPERE_OR_LATER, BLOCK_OF_COLUMNS, FLOAT32, ON_NVIDIA_GPU, TRITON
from .split_tf32 import add_product

OPERATOR = "sparsify"

# Columns whose error is propagated to later ones at once, as in the paper's code; each block meets the ratio of an
# unstructured mask.
BLOCK = 128

# (block [out, b], U's own block, mask or None, zeros, group) -> (E [out, b], losses [out]); the block is changed.
Walk = Callable[[Tensor, Tensor, Tensor | None, int, int], tuple[Tensor, Tensor]]


def block_columns(group: int) -> int:
    """Columns of a block: about BLOCK, a multiple of the group (0: no group)."""
    return BLOCK if group == 0 else max(1, BLOCK // group) * group


def lowest_of_groups(scores: Tensor, zeros: int, group: int) -> Tensor:
    """The `zeros` lowest of every `group` scores in a row, the first of equal ones; bool of scores' shape [..., n]."""
    order = scores.unflatten(-1, (-1, group)).argsort(dim=-1, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :zeros], True).flatten(-2)


def lowest_of_all(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of all scores, the first of equal ones; bool of scores' shape."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view(scores.shape)


def block_mask(block: Tensor, diagonal: Tensor, ratio: float, parts: list[int]) -> Tensor:
    """An unstructured mask of a block [out, b]: in each part of the rows the int(ratio·n) lowest W² / U_jj²."""
    scores = (block / diagonal).square()
    return torch.cat([lowest_of_all(part, int(ratio * part.numel())) for part in scores.split(parts)])


def walk_reference(block: Tensor, factor: Tensor, mask: Tensor | None, zeros: int, group: int) -> tuple[Tensor, Tensor]:
    """Walk the columns of a block [out, b], in place. Returns (E [out, b], the error for later columns; losses).

    factor: U's own block [b, b]. mask: the weights to zero, or None: chosen group by group during the walk.
    """
    diagonal = factor.diagonal()
    errors = torch.zeros_like(block)
    chosen = torch.zeros(block.shape, dtype=torch.bool, device=block.device) if mask is None else mask
    for column in range(block.shape[1]):
        if mask is None and column % group == 0:
            own = slice(column, column + group)
            chosen[:, own] = lowest_of_groups((block[:, own] / diagonal[own]).square(), zeros, group)
        gone = chosen[:, column]
        error = torch.where(gone, block[:, column] / diagonal[column], 0)
        block[:, column:].addr_(error, factor[column, column:], alpha=-1)
        block[:, column].masked_fill_(gone, 0)
        errors[:, column] = error
    return errors, errors.square().sum(1)


def check_tensors(weight: Tensor, factor: Tensor, zeros: int, group: int, ratio: float, parts: list[int]) -> None:
    """ValueError for arguments of sparsify_ that do not fit each other."""
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sparsify: weight is {weight.dtype} {list(weight.shape)}; use a float32 or float64 matrix")
    check_kind(OPERATOR, "weight", weight, WIDE)
    check_kind(OPERATOR, "factor", factor, WIDE)
    channels = weight.shape[1]
    if factor.shape != (channels, channels) or factor.dtype != weight.dtype or factor.device != weight.device:
        raise ValueError(
            f"sparsify: factor is {factor.dtype} {list(factor.shape)} on {factor.device}; weight "
            f"{list(weight.shape)} needs {weight.dtype} {[channels, channels]} on {weight.device}"
        )
    if group == 0:
        if not 0 <= ratio <= 1:
            raise ValueError(f"sparsify: the ratio is {ratio}; it is a share of the weights, 0 to 1")
    elif not 0 <= zeros <= group:
        raise ValueError(f"sparsify: {zeros} zeros of every {group}")
    elif channels % group:
        raise ValueError(f"sparsify: {channels} columns are not a multiple of the group of {group}")
    if parts and sum(parts) != len(weight):
        raise ValueError(f"sparsify: parts {parts} are not the {len(weight)} rows of the weight")


@torch.library.custom_op(
    "pyprune::sparsify_",
    mutates_args=("weight",),
    schema="(Tensor(a!) weight, Tensor factor, int zeros, int group, float ratio=0., int[] parts=[]) -> Tensor",
)
def sparsify_(
    weight: Tensor, factor: Tensor, zeros: int, group: int, ratio: float = 0.0, parts: list[int] | None = None
) -> Tensor:
    """Set weights to zero in place and let the columns behind make up for them. Returns the losses, [out].

    weight: W [out, in] float32 or float64, any strides. factor: U [in, in] of its type, upper triangular,
    Uᵀ U the inverse of the damped Hessian (`inverse_factor`). Column by column, what goes has the error
    e = w_j / U_jj, w_j becomes 0, and w_k -= e U_jk for k ≥ j; the loss of a row is Σ e², in the units of the Hessian.

    group > 0: of every `group` consecutive weights of a row the `zeros` lowest w² / U_jj² go, chosen when the walk
    comes to them. group = 0: in every block of BLOCK columns the int(ratio·n) lowest of its n go; `parts`: numbers of
    rows that are compared among themselves, as weights of several matrices on the same inputs (none: all rows).
    The first of equal ones goes. Raises ValueError for arguments that do not fit, InputError as choose_backend does.
    """
    parts = parts or []
    check_tensors(weight, factor, zeros, group, ratio, parts)
    check_apart(OPERATOR, {"weight": weight}, {"factor": factor})
    if weight.numel() == 0:
        return weight.new_zeros(len(weight))
    walk = choose_launch(SPARSIFY, weight, (len(weight), block_columns(group)))
    rows = weight if weight.stride(1) == 1 else weight.contiguous()  # the kernel reads along rows
    with exact_float32():
        losses = walk_blocks(rows, as_rows(factor), zeros, group, ratio, parts, walk)
    if rows is not weight:
        weight.copy_(rows)
    return losses


@sparsify_.register_fake
def _(
    weight: Tensor, factor: Tensor, zeros: int, group: int, ratio: float = 0.0, parts: list[int] | None = None
) -> Tensor:
    check_tensors(weight, factor, zeros, group, ratio, parts or [])
    return weight.new_empty(len(weight))


def walk_blocks(
    weight: Tensor, factor: Tensor, zeros: int, group: int, ratio: float, parts: list[int], walk: Walk
) -> Tensor:
    losses = weight.new_zeros(len(weight))
    width = block_columns(group)
    for first in range(0, weight.shape[1], width):
        own, behind = slice(first, first + width), slice(first + width, None)
        block, diagonal_block = weight[:, own], factor[own, own]
        mask = None
        if group == 0:
            mask = block_mask(block, diagonal_block.diagonal(), ratio, parts or [len(weight)])
        errors, own_losses = walk(block, diagonal_block, mask, zeros, group)
        losses += own_losses
        add_product(weight[:, behind], errors, factor[own, behind].mT, -1.0)
    return losses


def sparsify_reference(
    weight: Tensor, factor: Tensor, zeros: int, group: int, ratio: float = 0.0, parts: list[int] | None = None
) -> Tensor:
    """Reference of sparsify_ in plain PyTorch on any device; the kernel is tested against it in float64."""
    with exact_float32():
        return walk_blocks(weight, factor, zeros, group, ratio, parts or [], walk_reference)


def walk_triton(block: Tensor, factor: Tensor, mask: Tensor | None, zeros: int, group: int) -> tuple[Tensor, Tensor]:
    from ..triton_kernels.sparsify import walk_block

    with torch.cuda.device(block.device):
        return walk_block(block, factor, mask, zeros, group)


# Shape: [rows, columns of a block]
SPARSIFY: Operator[Walk] = Operator(
    OPERATOR,
    versions={"sparsify_": 1},
    kernels={
        "triton": Kernel(walk_triton, (ON_NVIDIA_GPU, FLOAT32, AMPERE_OR_LATER, BLOCK_OF_COLUMNS, *TRITON)),
        "reference": Kernel(walk_reference),
    },
)
