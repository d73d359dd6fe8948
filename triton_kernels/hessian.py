"""Second moments in Triton: lower += Σ w² x xᵀ where row ≥ column, and sums += Σ w² x, for x [rows, channels].

One program computes one tile of the triangle over all rows, or over a part of them: the tiles that would leave the
last wave of programs mostly empty are cut along the rows; all parts but the first go to a workspace, and a second
launch adds them in their order. No two programs add to one element of the result, so the same input gives the same
bits.

Tensor cores cut off the low bits of an accumulator at every step, and a diagonal element only grows: over 1 M rows
diag(H) drifts by −5e-6 when the accumulator is kept for 2048 rows, −2.7e-5 for 8192, −5.5e-3 for all (H200, bf16).
The accumulator therefore never runs over more than FLUSH_ROWS rows, and is then added to a total in registers,
rounded to nearest.

Weights, of which `weights` holds the square roots w, multiply one operand of a product on its way through registers:
w² x is exact in the rows' type where w is a power of two, and the other operand stays in shared memory, which wgmma
demands. float16 has too few exponents for w²: its weights are divided by a power of two not below the largest one,
and the accumulators multiplied by it again. Kernels without weights are compiled without them.

The sums are a pass of their own: a block of x that feeds both a product and a sum gets one buffer too few from
Triton 3.6, whose next load then overwrites what wgmma still reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.row_weights import divisor_of
from ..ops.tuning import tuned_configuration
from .channel_moments import configuration_for as moments_configuration
from .channel_moments import divide_rows, tiles_of_chunk

# |drift of diag(H)| ≤ 1e-5: on an H200, fp16 and 1 M rows, 3072 rows between two flushes lost 1.6e-5.
FLUSH_ROWS = 1536


@dataclass(frozen=True)
class Configuration:
    """How a launch is cut.

    tile × tile elements of the result belong to one program, which reads `depth` rows of x at a time, `stages` deep,
    with `warps` warps. band: tile rows that are walked together, column by column. tma: x and the result pass through
    the tensor memory accelerator (sm_90 and later; bf16 and fp16; rows on multiples of 16 bytes). One program fills a
    multiprocessor.
    """

    tile: int
    depth: int
    warps: int
    stages: int
    band: int
    tma: bool


# Why these numbers (Triton 3.6).
# 128: the accumulator and the total take 64 registers each of 256 threads, and leave 127 for the rest.
# 64: rows that start anywhere are read element by element, which takes registers and time anyway.
# depth: 64 rows are four steps of the tensor cores on 16-bit elements; 32 rows of fp32 are as many bytes.
# stages: what shared memory and registers hold (tests/kernels/test_hessian_triton.py).
# band: 132 multiprocessors then work on about 12 x 11 tiles: the fewest columns of x.
TMA = Configuration(128, depth=64, warps=8, stages=6, band=12, tma=True)
POINTERS = Configuration(128, depth=64, warps=8, stages=4, band=12, tma=False)
FLOAT32 = Configuration(128, depth=32, warps=8, stages=3, band=12, tma=False)
ANY_WIDTH = Configuration(64, depth=32, warps=4, stages=3, band=12, tma=False)

# A tile that is cut into parts costs time by itself, here in steps of `depth` rows of one tile, 0.3 µs on an H100:
# the second launch and the zeroing of the workspace, and for each part its 64 KiB, written, added and read.
SPLIT_STEPS = 16
PART_STEPS = 0.25
# A part of less than 4 steps is mostly the filling of its pipeline.
SMALLEST_PART_STEPS = 4
# Rows of a tile that one program of the second launch adds: 8 or 16 programs a tile, 4 to 16 elements a thread.
STRIP_ROWS = 8


@triton.jit
def triangle_row(index):
    """The row that holds the index-th element of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: one off at most.
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def tile_of(index, tile_rows, BAND: tl.constexpr):
    """(row, column) of a tile of the lower triangle: bands of BAND rows, in each column by column.

    The corner of a band at the diagonal comes last, row by row.
    """
    first = triangle_row(index) // BAND * BAND
    index -= first * (first + 1) // 2
    height = tl.minimum(BAND, tile_rows - first)
    in_corner = index >= height * (first + 1)
    corner_index = tl.where(in_corner, index - height * (first + 1), 0)
    corner_row = triangle_row(corner_index)
    row = tl.where(in_corner, first + 1 + corner_row, first + index % height)
    corner_column = first + 1 + corner_index - corner_row * (corner_row + 1) // 2
    return row, tl.where(in_corner, corner_column, index // height)


@triton.jit
def work_of(program, whole_tiles, split_tiles):
    """(tile, part, slot of the workspace) of a program: whole tiles first, then all first parts, all second …"""
    split = tl.maximum(program - whole_tiles, 0)
    divisor = tl.maximum(split_tiles, 1)
    part = split // divisor
    tile = tl.where(program < whole_tiles, program, whole_tiles + split % divisor)
    return tile, part, split - split_tiles


@triton.jit
def weighted(block, weights, divisor, first, rows):
    """w² times the rows of a block [DEPTH, TILE], which begins at row `first`, in its type."""
    row = first + tl.arange(0, block.shape[0])
    roots = tl.load(weights + row, mask=row < rows, other=0.0)
    if divisor is not None:
        roots *= 1.0 / tl.load(divisor)
    return (block.to(tl.float32) * (roots * roots)[:, None]).to(block.dtype)


@triton.jit(do_not_specialize=["rows", "steps", "part_steps", "flush_steps", "tile_rows", "whole_tiles", "split_tiles"])
def hessian_tma(
    x,  # descriptor of [rows, channels], blocks [DEPTH, TILE]
    lower,  # descriptor of float32 [channels, channels], blocks [TILE, TILE]
    workspace,  # descriptor of float32 [slots · TILE, TILE], zeros, blocks as in `lower`
    weights,  # float32 [rows], or None
    divisor,  # float32 scalar, a power of two that weights are divided by, or None
    rows,
    steps,  # blocks of DEPTH rows in x
    part_steps,  # blocks in a part of a split tile
    flush_steps,  # blocks that the accumulator may run over
    tile_rows,  # rows of tiles in the triangle
    whole_tiles,
    split_tiles,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    tile, part, slot = work_of(tl.program_id(0), whole_tiles, split_tiles)
    tile_row, tile_column = tile_of(tile, tile_rows, BAND)
    row = tile_row * TILE
    column = tile_column * TILE
    first = part * part_steps
    last = tl.minimum(tl.where(tile < whole_tiles, steps, first + part_steps), steps)

    accumulator = tl.zeros((TILE, TILE), tl.float32)
    total = tl.zeros((TILE, TILE), tl.float32)
    until_flush = flush_steps
    # One loop, not a loop of chunks: the next blocks are on their way while the accumulator is flushed.
    for step in tl.range(first, last):
        left = x.load([step * DEPTH, row])  # [DEPTH, TILE]
        right = x.load([step * DEPTH, column])
        if weights is not None:
            left = weighted(left, weights, divisor, step * DEPTH, rows)
        accumulator = tl.dot(left.T, right, accumulator)
        until_flush -= 1
        if (until_flush == 0) & (step + 1 < last):
            total += accumulator
            accumulator = tl.zeros((TILE, TILE), tl.float32)
            until_flush = flush_steps
    accumulator += total
    if divisor is not None:
        accumulator *= tl.load(divisor) * tl.load(divisor)
    if part == 0:
        lower.atomic_add([row, column], accumulator)
    else:
        workspace.atomic_add([slot * TILE, 0], accumulator)


@triton.jit(
    do_not_specialize=[
        "rows",
        "channel_units",
        "stride_units",
        "steps",
        "part_steps",
        "flush_steps",
        "tile_rows",
        "whole_tiles",
        "split_tiles",
    ]
)
def hessian_pointers(
    x,  # [rows, channels]
    lower,  # float32 [channels, channels]
    workspace,  # float32 [slots, TILE, TILE]
    weights,  # as in hessian_tma
    divisor,
    rows,
    channel_units,  # channels / UNIT
    stride_units,  # elements from row to row / UNIT
    steps,
    part_steps,
    flush_steps,
    tile_rows,
    whole_tiles,
    split_tiles,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    UNIT: tl.constexpr,  # elements that are read at a time: 16 bytes, or 1
    PRECISION: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """As hessian_tma, for every device, type and width."""
    tile, part, slot = work_of(tl.program_id(0), whole_tiles, split_tiles)
    tile_row, tile_column = tile_of(tile, tile_rows, BAND)
    first = part * part_steps
    last = tl.minimum(tl.where(tile < whole_tiles, steps, first + part_steps), steps)

    channels = channel_units * UNIT
    # 64 bits: rows × channels passes 2^31 (262144 × 28672).
    stride = tl.cast(stride_units, tl.int64) * UNIT
    depth = tl.arange(0, DEPTH)
    row = tile_row * TILE + tl.arange(0, TILE)
    column = tile_column * TILE + tl.arange(0, TILE)
    accumulator = tl.zeros((TILE, TILE), tl.float32)
    total = tl.zeros((TILE, TILE), tl.float32)
    until_flush = flush_steps
    for step in tl.range(first, last):
        present = (step * DEPTH + depth < rows)[:, None]
        block = x + (step * DEPTH + depth).to(tl.int64)[:, None] * stride
        left = tl.load(block + row[None, :], mask=present & (row < channels)[None, :], other=0.0)
        right = tl.load(block + column[None, :], mask=present & (column < channels)[None, :], other=0.0)
        if weights is not None:
            left = weighted(left, weights, divisor, step * DEPTH, rows)
        accumulator = tl.dot(left.T, right, accumulator, input_precision=PRECISION)
        if FLUSH:
            until_flush -= 1
            if until_flush == 0:
                total += accumulator
                accumulator = tl.zeros((TILE, TILE), tl.float32)
                until_flush = flush_steps
    if FLUSH:
        accumulator += total
    if divisor is not None:
        accumulator *= tl.load(divisor) * tl.load(divisor)
    if part == 0:
        out = lower + row.to(tl.int64)[:, None] * channels + column[None, :]
        inside = (row < channels)[:, None] & (column < channels)[None, :]
        tl.store(out, tl.load(out, mask=inside, other=0.0) + accumulator, mask=inside)
    else:
        offsets = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(workspace + slot.to(tl.int64) * (TILE * TILE) + offsets, accumulator)


@triton.jit(do_not_specialize=["channels", "parts", "tile_rows", "whole_tiles", "split_tiles"])
def add_parts(
    lower,
    workspace,  # float32 [parts − 1, split_tiles, TILE, TILE]
    channels,
    parts,
    tile_rows,
    whole_tiles,
    split_tiles,
    TILE: tl.constexpr,
    BAND: tl.constexpr,
    STRIP: tl.constexpr,  # rows of a tile that one program adds
):
    """Add the later parts of the split tiles to the result, in their order."""
    split = tl.program_id(0)
    tile_row, tile_column = tile_of(whole_tiles + split, tile_rows, BAND)
    strip = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    block = tl.arange(0, TILE)
    row = tile_row * TILE + strip
    column = tile_column * TILE + block
    inside = (row < channels)[:, None] & (column < channels)[None, :]
    out = lower + row.to(tl.int64)[:, None] * channels + column[None, :]
    total = tl.load(out, mask=inside, other=0.0)
    for part in tl.range(0, parts - 1):
        slot = (part * split_tiles + split).to(tl.int64)
        total += tl.load(workspace + slot * (TILE * TILE) + strip[:, None] * TILE + block[None, :])
    tl.store(out, total, mask=inside)


@triton.jit(do_not_specialize=["channels", "tiles_per_chunk", "longer_chunks", "tail_rows"])
def chunk_sums(
    x,  # [rows, channels], row_stride elements from row to row
    out,  # float32 [chunks, channels]
    weights,  # float32 [rows], or None
    channels,
    row_stride,
    tiles_per_chunk,  # as in channel_moments.chunk_moments
    longer_chunks,
    tail_rows,
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ w² x over every chunk of rows."""
    channel, tiles, tile, offsets, stride = tiles_of_chunk(
        x, row_stride, tiles_per_chunk, longer_chunks, TILE_ROWS, TILE_CHANNELS
    )
    inside = channel < channels
    sums = tl.zeros((TILE_CHANNELS,), tl.float32)
    chunk = tl.program_id(1)
    if weights is not None:
        root = weights + (chunk * tiles_per_chunk + tl.minimum(chunk, longer_chunks)).to(tl.int64) * TILE_ROWS
        root += tl.arange(0, TILE_ROWS)
    # A loop without a dot is pipelined only when tl.range is told so (Triton 3.6).
    for _ in tl.range(0, tiles, num_stages=STAGES):
        values = tl.load(tile + offsets, mask=inside[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            roots = tl.load(root)
            values *= (roots * roots)[:, None]
            root += TILE_ROWS
        sums += tl.sum(values, 0)
        tile += TILE_ROWS * stride
    if (chunk == tl.num_programs(1) - 1) & (tail_rows > 0):
        present = (tl.arange(0, TILE_ROWS) < tail_rows)[:, None] & inside[None, :]
        values = tl.load(tile + offsets, mask=present, other=0.0).to(tl.float32)
        if weights is not None:
            roots = tl.load(root, mask=tl.arange(0, TILE_ROWS) < tail_rows, other=0.0)
            values *= (roots * roots)[:, None]
        sums += tl.sum(values, 0)
    tl.store(out + chunk.to(tl.int64) * channels + channel, sums, mask=inside)


@dataclass(frozen=True)
class Division:
    """The tiles as programs take them.

    whole: tiles that one program computes over all rows. split: tiles that `parts` programs share, `part_steps`
    blocks of rows each (the last one what is left).
    """

    whole: int
    split: int
    parts: int
    part_steps: int

    @property
    def programs(self) -> int:
        return self.whole + self.split * self.parts

    @property
    def slots(self) -> int:
        """Tiles of the workspace: every part but the first of each split tile."""
        return self.split * (self.parts - 1)


def tile_count(channels: int, tile: int) -> int:
    """Tiles of the lower triangle that hold an element on or below the diagonal."""
    rows = triton.cdiv(channels, tile)
    return rows * (rows + 1) // 2


@lru_cache(maxsize=1024)
def divide_tiles(tiles: int, steps: int, multiprocessors: int) -> Division:
    """Whole tiles while they fill the device; the rest in as many parts as end soonest."""
    split = tiles % multiprocessors

    def duration(parts: int) -> float:
        waves = ceil(split * parts / multiprocessors)
        return waves * ceil(steps / parts) + (SPLIT_STEPS + PART_STEPS * split * (parts - 1) if parts > 1 else 0)

    most = min(multiprocessors, steps // SMALLEST_PART_STEPS) if split else 1
    part_steps = ceil(steps / min(range(1, most + 1), key=duration, default=1))
    # Rounding the length of a part up may leave the last ones without rows.
    parts = ceil(steps / part_steps)
    if parts == 1:
        return Division(tiles, 0, 1, steps)
    return Division(tiles - split, split, parts, part_steps)


def read_unit(x: torch.Tensor) -> int:
    """Elements of a row that can be read at a time: 16 bytes of them where every row starts on 16 bytes, else 1."""
    unit = 16 // x.element_size()
    return unit if x.data_ptr() % 16 == 0 and x.shape[1] % unit == 0 and row_stride_of(x) % unit == 0 else 1


def row_stride_of(x: torch.Tensor) -> int:
    # The stride of a single row has no meaning and may be anything.
    return x.stride(0) if len(x) > 1 else x.shape[1]


def shipped_configuration(capability: tuple[int, int], element_size: int) -> Configuration:
    """The table's entry for rows on multiples of 16 bytes, elements of 2 or 4 bytes, on this compute capability."""
    if element_size == 4:
        return FLOAT32
    return TMA if capability >= (9, 0) else POINTERS


def configuration_for(capability: tuple[int, int], x: torch.Tensor) -> Configuration:
    """For x [rows, channels]: what was tuned on its GPU (pyprune/ops/tuning.py), else the table's entry."""
    if read_unit(x) == 1:
        return ANY_WIDTH
    tuned = tuned_configuration("hessian", Configuration, capability, x.element_size(), x.device)
    return tuned or shipped_configuration(capability, x.element_size())


def flush_steps_for(steps: int, depth: int) -> int:
    """Blocks of `depth` rows between two flushes of the accumulator: equal chunks of at most FLUSH_ROWS rows."""
    return ceil(steps / ceil(steps / (FLUSH_ROWS // depth)))


def hessian_triton(
    x: torch.Tensor,
    lower: torch.Tensor,
    sums: torch.Tensor | None,
    configuration: Configuration,
    multiprocessors: int,
    weights: torch.Tensor | None = None,
) -> None:
    """lower += Σ w² x xᵀ where row ≥ column; sums += Σ w² x unless None.

    x: [rows, channels] bf16, fp16 or fp32, unit stride in channels, any row stride, at least one row.
    lower: float32 [channels, channels], contiguous; above its diagonal anything may be written. sums: float32
    [channels], contiguous. weights: float32 [rows], contiguous, w; None: 1. The device of x is current. A
    configuration with `tma` needs read_unit(x) = 8.
    """
    rows, channels = x.shape
    tile = configuration.tile
    steps = triton.cdiv(rows, configuration.depth)
    division = divide_tiles(tile_count(channels, tile), steps, multiprocessors)
    tiles = (triton.cdiv(channels, tile), division.whole, division.split)
    # Where no tile is split nothing touches the workspace: the result stands in for it.
    workspace = lower
    if division.slots:
        workspace = torch.zeros(division.slots * tile, tile, dtype=torch.float32, device=x.device)
    longest = division.part_steps if not division.whole else steps
    divisor = divisor_of(weights) if weights is not None and x.dtype == torch.float16 else None
    lengths = (steps, division.part_steps, flush_steps_for(longest, configuration.depth))
    shape = {"TILE": tile, "BAND": configuration.band}
    options = {"DEPTH": configuration.depth, "num_warps": configuration.warps, "num_stages": configuration.stages}
    if configuration.tma:
        hessian_tma[(division.programs,)](
            TensorDescriptor(x, [rows, channels], [row_stride_of(x), 1], [configuration.depth, tile]),
            TensorDescriptor(lower, [channels, channels], [channels, 1], [tile, tile]),
            TensorDescriptor(workspace, list(workspace.shape), [workspace.shape[1], 1], [tile, tile]),
            weights,
            divisor,
            rows,
            *lengths,
            *tiles,
            **shape,
            **options,
        )
    else:
        unit = read_unit(x)
        hessian_pointers[(division.programs,)](
            x,
            lower,
            workspace,
            weights,
            divisor,
            rows,
            channels // unit,
            row_stride_of(x) // unit,
            *lengths,
            *tiles,
            UNIT=unit,
            PRECISION="tf32x3",
            FLUSH=x.element_size() == 2,
            **shape,
            **options,
        )
    if division.slots:
        add_parts[(division.split, tile // STRIP_ROWS)](
            lower, workspace, channels, division.parts, *tiles, STRIP=STRIP_ROWS, **shape, num_warps=4
        )
    if sums is not None:
        column_sums_triton(x, sums, multiprocessors, weights)


def column_sums_triton(
    x: torch.Tensor, sums: torch.Tensor, multiprocessors: int, weights: torch.Tensor | None = None
) -> None:
    """sums += Σ w² x. x: [rows, channels], at least one row; sums: float32 [channels], weights: [rows], contiguous."""
    rows, channels = x.shape
    configuration = moments_configuration((9, 0), x.element_size())
    chunks = divide_rows(rows, channels, multiprocessors, configuration)
    partial = torch.empty(chunks.count, channels, dtype=torch.float32, device=x.device)
    chunk_sums[(triton.cdiv(channels, configuration.tile_channels), chunks.count)](
        x,
        partial,
        weights,
        channels,
        row_stride_of(x),
        chunks.tiles,
        chunks.longer,
        chunks.tail_rows,
        TILE_ROWS=configuration.tile_rows,
        TILE_CHANNELS=configuration.tile_channels,
        STAGES=configuration.stages,
        num_warps=configuration.warps,
    )
    sums.add_(partial.sum(0))
