"""SparseGPT's walk over one block of columns in Triton: every row by itself, its whole block in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A program's rows: with four warps a row of 128 columns lies in one warp, which adds and compares without the others.
ROWS, WARPS = 16, 4


@triton.jit
def walk_columns(
    block,  # float32 [rows, columns], row_stride elements from row to row; changed in place
    row_stride,
    factor,  # float32 [columns, columns] of U, factor_stride elements from row to row
    factor_stride,
    mask,  # uint8 [rows, columns], read with MASKED
    errors,  # float32 [rows, columns], written
    losses,  # float32 [rows], written
    rows,
    columns,
    ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two from `columns` on
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    # 64 bits: the block is a view of a whole weight.
    places = block + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    w = tl.load(places, mask=inside, other=0.0)
    own = row.to(tl.int64)[:, None] * columns + column[None, :]
    if MASKED:
        gone = tl.load(mask + own, mask=inside, other=0).to(tl.int32)
    else:
        gone = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    diagonal = tl.load(factor + column * (factor_stride + 1), mask=column < columns, other=1.0)
    error = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for j in range(columns):
        here = (column == j)[None, :]
        if not MASKED:  # noqa: SIM102 (the one is known when it is compiled, the other is not)
            if j % GROUP == 0:
                ratio = w / diagonal[None, :]
                scores = ratio * ratio
                lower = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)  # how many of the group go before this one
                for k in tl.static_range(GROUP):
                    other = tl.sum(tl.where((column == j + k)[None, :], scores, 0.0), axis=1)[:, None]
                    earlier = (column > j + k)[None, :]
                    lower += ((other < scores) | ((other == scores) & earlier)).to(tl.int32)
                group = ((column >= j) & (column < j + GROUP))[None, :]
                gone = tl.where(group, (lower < ZEROS).to(tl.int32), gone)
        value = tl.sum(tl.where(here, w, 0.0), axis=1)
        goes = tl.sum(tl.where(here, gone, 0), axis=1) > 0
        line = tl.load(factor + j * factor_stride + column, mask=(column >= j) & (column < columns), other=0.0)
        pivot = tl.load(factor + j * (factor_stride + 1))
        e = tl.where(goes, value / pivot, 0.0)
        w -= e[:, None] * line[None, :]
        w = tl.where(here & goes[:, None], 0.0, w)
        error = tl.where(here, e[:, None], error)
    tl.store(places, w, mask=inside)
    tl.store(errors + own, error, mask=inside)
    tl.store(losses + row, tl.sum(error * error, axis=1), mask=row < rows)


def walk_block(
    block: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor | None, zeros: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As pyprune.ops.sparsify.walk_reference; block [rows, columns ≤ 128], factor: float32, unit stride in columns."""
    rows, columns = block.shape
    errors = torch.empty(rows, columns, dtype=torch.float32, device=block.device)
    losses = torch.empty(rows, dtype=torch.float32, device=block.device)
    walk_columns[(triton.cdiv(rows, ROWS),)](
        block,
        block.stride(0),
        factor,
        factor.stride(0),
        errors if mask is None else mask.view(torch.uint8),
        errors,
        losses,
        rows,
        columns,
        ZEROS=zeros,
        GROUP=max(group, 1),
        MASKED=mask is not None,
        ROWS=ROWS,
        COLUMNS=triton.next_power_of_2(columns),
        num_warps=WARPS,
    )
    return errors, losses
