"""Channel moments in Triton: count, mean and centred sum of squares of every channel of x [rows, channels].

Two launches. Stage 1 cuts the rows into chunks, one program per chunk and block of channels; each program
centres every tile of `tile_rows` rows on the tile's own mean and merges it into the chunk's moments (Chan,
Golub & LeVeque 1983), all in float32 registers. Stage 2 merges the chunks, and then the running state, in
fixed order. When there is one chunk, stage 1 merges into the state itself and stage 2 is not launched.

With weights of rows, of which `weights` holds the square roots, a row counts w² where it else counts 1, and the
chunks' Σ w² are partial results like their means. Kernels without weights are compiled without them.

Nothing is added atomically and the chunks depend on nothing but the shape and the device: the same input
gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..ops.tuning import tuned_configuration


@dataclass(frozen=True)
class Configuration:
    """How stage 1 is cut.

    tile_rows × tile_channels elements are read at a time by `warps` warps, `stages` tiles deep (1: straight
    into registers). `resident` programs share a multiprocessor, and the grid is `waves` times as many
    programs as the device holds at once. `early_merge`: stage 2 is launched while stage 1 still runs and
    waits on the device (programmatic dependent launch, sm_90 and later), which hides its launch.
    """

    tile_rows: int
    tile_channels: int
    warps: int
    stages: int
    resident: int
    waves: int
    early_merge: bool


# Why these numbers (Triton 3.6).
# warps: one thread owns one 16-byte column of the tile (tile_channels = 32·warps·16 / element size), so that
# a column's sum needs no shuffle.
# tile_rows = 8: 16 rows take more than 128 registers; 4 rows spend a fifth more instructions an element on
# the merge (233 for 32 elements against 389 for 64, sm_90).
# stages = 4: three tiles of 16 KiB in flight, 48 KiB of shared memory.
# resident: what registers and shared memory allow (tests/kernels/test_triton_compile.py), and no more than pays: on an
# H200 at 65536 x 4096, 262144 x 4096, 65536 x 11008 and 32768 x 28672 bf16, three reach 98.6, 104.1, 102.6 and 102.1 %
# of the rate of a copy, four 96.8, 103.3, 102.4 and 100.3 %: 144 KiB in flight on a multiprocessor suffice, and fewer
# programs leave fewer chunks to merge.
# waves = 1: every program starts at once and the chunks are equal to within one tile.
# Keys: (compute capability of the machine code, bytes of an element).
CONFIGURATIONS: dict[tuple[int, int], Configuration] = {
    (90, 2): Configuration(8, 1024, warps=4, stages=4, resident=3, waves=1, early_merge=True),
    (90, 4): Configuration(8, 512, warps=4, stages=4, resident=4, waves=1, early_merge=True),
    (80, 2): Configuration(8, 1024, warps=4, stages=4, resident=3, waves=1, early_merge=False),
    (80, 4): Configuration(8, 512, warps=4, stages=4, resident=3, waves=1, early_merge=False),
}

# A chunk's partial result costs 16 bytes a channel to write and read again. Eight tiles of 8 rows are 128
# bytes of bf16 a channel: at most an eighth more traffic. It also means one launch below 128 rows.
SMALLEST_CHUNK_TILES = 8

# Stage 2: chunks × channels that one program reads at a time. 128 covers the 99 chunks of a 4096-wide bf16 input
# (132 multiprocessors) in one step; 32 channels are one 128-byte line, and 128 programs at 4096 channels.
# 80 registers, no spills with 8 warps (128 with 4).
MERGE_GROUP = 128
MERGE_CHANNELS = 32
MERGE_WARPS = 8


@triton.jit
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Chan: the moments of two disjoint sets of rows; count_a + count_b > 0."""
    fraction = count_b / (count_a + count_b)
    delta = mean_b - mean_a
    return mean_a + delta * fraction, m2_a + m2_b + delta * delta * (count_a * fraction)


@triton.jit
def merge_weighted(total_a, mean_a, m2_a, total_b, mean_b, m2_b):
    """As merge_moments, for totals of weights, which may both be 0."""
    fraction = tl.where(total_b > 0, total_b / (total_a + total_b), 0.0)
    delta = mean_b - mean_a
    return mean_a + delta * fraction, m2_a + m2_b + delta * delta * (total_a * fraction)


@triton.jit
def weighted_moments(values, roots):
    """Σ w², mean and M2 of a tile [rows, channels], whose roots w [rows] are 0 in rows that are not there.

    The total is summed for each channel: what one thread needs it computes, and no thread asks another.
    """
    squares = tl.broadcast_to((roots * roots)[:, None], values.shape)
    total = tl.sum(squares, 0)
    mean = tl.sum(values * squares, 0) * tl.where(total > 0, 1.0 / total, 0.0)
    centred = values - mean[None, :]
    return total, mean, tl.sum(centred * centred * squares, 0)


@triton.jit
def tiles_of_chunk(x, row_stride, tiles_per_chunk, longer_chunks, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """What the program (block of channels, chunk of rows) reads, with the arguments of chunk_moments.

    Its channels and the number of its full tiles; the address of the first, the offsets of elements in a tile
    [TILE_ROWS, TILE_CHANNELS], and the elements from row to row.
    """
    chunk = tl.program_id(1)
    channel = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    row = tl.arange(0, TILE_ROWS)
    tiles = tiles_per_chunk + (chunk < longer_chunks).to(tl.int32)
    first_tile = chunk * tiles_per_chunk + tl.minimum(chunk, longer_chunks)
    # 64 bits: rows × channels passes 2^31 (262144 × 28672).
    stride = tl.cast(row_stride, tl.int64)
    tile = x + first_tile.to(tl.int64) * TILE_ROWS * stride
    return channel, tiles, tile, row[:, None] * stride + channel[None, :], stride


@triton.jit(do_not_specialize=["tiles_per_chunk", "longer_chunks", "tail_rows"])
def chunk_moments(
    x,  # [rows, channels], row_stride elements from row to row
    out_mean,  # float32 [chunks, channels], or the state's [channels] with MERGE_STATE
    out_m2,
    channels,
    row_stride,
    tiles_per_chunk,  # full tiles of every chunk; the first `longer_chunks` chunks have one more
    longer_chunks,
    tail_rows,  # rows after the last full tile; the last chunk takes them
    count,  # float32: rows already in the state; read with MERGE_STATE only
    weights,  # float32 [rows], or None, as the next two
    total,  # float64 scalar: the weights in the state, instead of count
    out_total,  # float32 [chunks]; written unless MERGE_STATE
    TILE_ROWS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,  # channels % TILE_CHANNELS == 0
    MERGE_STATE: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
):
    channel, tiles, tile, offsets, stride = tiles_of_chunk(
        x, row_stride, tiles_per_chunk, longer_chunks, TILE_ROWS, TILE_CHANNELS
    )
    chunk = tl.program_id(1)
    inside = channel < channels

    mean = tl.zeros((TILE_CHANNELS,), tl.float32)
    m2 = tl.zeros((TILE_CHANNELS,), tl.float32)
    if weights is not None:
        seen = tl.zeros((TILE_CHANNELS,), tl.float32)
        root = weights + (chunk * tiles_per_chunk + tl.minimum(chunk, longer_chunks)).to(tl.int64) * TILE_ROWS
        root += tl.arange(0, TILE_ROWS)
    # A loop without a dot is pipelined only when tl.range is told so (Triton 3.6).
    for index in tl.range(0, tiles, num_stages=STAGES):
        if WHOLE_BLOCKS:
            values = tl.load(tile + offsets, eviction_policy="evict_first").to(tl.float32)
        else:
            values = tl.load(tile + offsets, mask=inside[None, :], other=0.0, eviction_policy="evict_first").to(
                tl.float32
            )
        if weights is not None:
            tile_total, tile_mean, tile_m2 = weighted_moments(values, tl.load(root))
            mean, m2 = merge_weighted(seen, mean, m2, tile_total, tile_mean, tile_m2)
            seen += tile_total
            root += TILE_ROWS
        else:
            tile_mean = tl.sum(values, 0) * (1.0 / TILE_ROWS)
            centred = values - tile_mean[None, :]
            # Full tiles weigh the same, so n_b / (n_a + n_b) = 1 / (index + 1).
            fraction = 1.0 / tl.cast(index + 1, tl.float32)
            delta = tile_mean - mean
            mean += delta * fraction
            m2 += tl.sum(centred * centred, 0) + delta * delta * (tl.cast(index * TILE_ROWS, tl.float32) * fraction)
        tile += TILE_ROWS * stride

    if EARLY_MERGE:
        gdc_launch_dependents()
    rows = tiles * TILE_ROWS
    if (chunk == tl.num_programs(1) - 1) & (tail_rows > 0):
        present = (tl.arange(0, TILE_ROWS) < tail_rows)[:, None] & inside[None, :]
        values = tl.load(tile + offsets, mask=present, other=0.0).to(tl.float32)
        if weights is not None:
            roots = tl.load(root, mask=tl.arange(0, TILE_ROWS) < tail_rows, other=0.0)
            tail_total, tail_mean, tail_m2 = weighted_moments(values, roots)
            mean, m2 = merge_weighted(seen, mean, m2, tail_total, tail_mean, tail_m2)
            seen += tail_total
        else:
            tail_mean = tl.sum(values, 0) / tail_rows.to(tl.float32)
            centred = tl.where(present, values - tail_mean[None, :], 0.0)
            tail_m2 = tl.sum(centred * centred, 0)
            mean, m2 = merge_moments(rows.to(tl.float32), mean, m2, tail_rows.to(tl.float32), tail_mean, tail_m2)
            rows += tail_rows

    if MERGE_STATE:
        state_mean = tl.load(out_mean + channel, mask=inside, other=0.0)
        state_m2 = tl.load(out_m2 + channel, mask=inside, other=0.0)
        if weights is not None:
            before = tl.load(total).to(tl.float32)
            mean, m2 = merge_weighted(before, state_mean, state_m2, seen, mean, m2)
        else:
            mean, m2 = merge_moments(count, state_mean, state_m2, rows.to(tl.float32), mean, m2)
    elif weights is not None:
        tl.store(out_total + chunk + channel, seen, mask=channel == 0)
    out = chunk.to(tl.int64) * channels + channel
    tl.store(out_mean + out, mean, mask=inside)
    tl.store(out_m2 + out, m2, mask=inside)


@triton.jit(do_not_specialize=["chunks", "tiles_per_chunk", "longer_chunks", "tail_rows"])
def merge_chunks(
    chunk_mean,  # float32 [chunks, channels]
    chunk_m2,
    state_mean,  # float32 [channels]
    state_m2,
    channels,
    chunks,
    tiles_per_chunk,
    longer_chunks,
    tail_rows,
    count,  # float32: rows already in the state
    total,  # float64 scalar: the weights in the state, instead of count; or None, as the next
    chunk_total,  # float32 [chunks]: weights, instead of rows
    TILE_ROWS: tl.constexpr,  # rows of a tile of stage 1
    GROUP: tl.constexpr,  # chunks merged at a time
    BLOCK_CHANNELS: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean = tl.load(state_mean + channel, mask=inside, other=0.0)
    m2 = tl.load(state_m2 + channel, mask=inside, other=0.0)
    if chunk_total is not None:
        count = tl.load(total).to(tl.float32)
    if EARLY_MERGE:
        gdc_wait()  # until every program of stage 1 has ended and what it stored can be read
    for first in tl.range(0, chunks, GROUP):
        chunk = first + tl.arange(0, GROUP)
        present = (chunk < chunks)[:, None] & inside[None, :]
        offsets = chunk.to(tl.int64)[:, None] * channels + channel[None, :]  # [GROUP, BLOCK_CHANNELS]
        means = tl.load(chunk_mean + offsets, mask=present, other=0.0)
        m2s = tl.load(chunk_m2 + offsets, mask=present, other=0.0)
        if chunk_total is not None:
            weight = tl.load(chunk_total + chunk, mask=chunk < chunks, other=0.0)[:, None]
            group_count = tl.sum(weight)
            group_mean = tl.sum(means * weight, 0) * tl.where(group_count > 0, 1.0 / group_count, 0.0)
        else:
            rows = (tiles_per_chunk + (chunk < longer_chunks).to(tl.int32)) * TILE_ROWS
            rows += tl.where(chunk == chunks - 1, tail_rows, 0)
            weight = tl.where(chunk < chunks, rows, 0).to(tl.float32)[:, None]
            group_count = tl.sum(weight)
            group_mean = tl.sum(means * weight, 0) / group_count
        centred = tl.where(present, means - group_mean[None, :], 0.0)
        group_m2 = tl.sum(m2s + weight * centred * centred, 0)
        if chunk_total is not None:
            mean, m2 = merge_weighted(count, mean, m2, group_count, group_mean, group_m2)
        else:
            mean, m2 = merge_moments(count, mean, m2, group_count, group_mean, group_m2)
        count += group_count
    tl.store(state_mean + channel, mean, mask=inside)
    tl.store(state_m2 + channel, m2, mask=inside)


@dataclass(frozen=True)
class Chunks:
    """The rows as stage 1 divides them: `count` chunks of `tiles` full tiles.

    The first `longer` chunks have one tile more; the last one also takes the `tail_rows` rows after the last
    full tile.
    """

    count: int
    tiles: int
    longer: int
    tail_rows: int


def divide_rows(rows: int, channels: int, multiprocessors: int, configuration: Configuration) -> Chunks:
    """As many equal chunks as fill the device `waves` times, none under SMALLEST_CHUNK_TILES tiles."""
    full_tiles, tail_rows = divmod(rows, configuration.tile_rows)
    column_blocks = triton.cdiv(channels, configuration.tile_channels)
    programs = multiprocessors * configuration.resident * configuration.waves
    count = max(1, min(full_tiles // SMALLEST_CHUNK_TILES, programs // column_blocks))
    tiles, longer = divmod(full_tiles, count)
    return Chunks(count, tiles, longer, tail_rows)


def shipped_configuration(capability: tuple[int, int], element_size: int) -> Configuration:
    """The table's entry for a device of this compute capability and elements of 2 or 4 bytes."""
    return CONFIGURATIONS[90 if capability >= (9, 0) else 80, element_size]


def configuration_for(
    capability: tuple[int, int], element_size: int, device: torch.device | None = None
) -> Configuration:
    """What was tuned on this GPU (pyprune/ops/tuning.py), else the table's entry. device: None is the current one."""
    tuned = tuned_configuration("channel_moments", Configuration, capability, element_size, device)
    return tuned or shipped_configuration(capability, element_size)


def channel_moments_triton(
    x: torch.Tensor,
    count: int,
    mean: torch.Tensor,
    m2: torch.Tensor,
    configuration: Configuration,
    multiprocessors: int,
    weights: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Merge the rows of x into the state.

    x: [rows, channels] bf16, fp16 or fp32, unit stride in channels, any row stride, at least one row.
    count: rows already in the state. mean, m2: float32 [channels], contiguous, changed in place.
    weights: float32 [rows], contiguous, and total: float64 scalar, Σ w² already in the state; or None, both.
    The device of x is current.
    """
    rows, channels = x.shape
    chunks = divide_rows(rows, channels, multiprocessors, configuration)
    merge_state = chunks.count == 1
    early_merge = configuration.early_merge and not merge_state
    if merge_state:
        chunk_mean, chunk_m2 = mean, m2
    else:
        # [2, chunks, channels], every element written by stage 1 before stage 2 reads it
        chunk_mean, chunk_m2 = torch.empty(2, chunks.count, channels, dtype=torch.float32, device=x.device)
    chunk_total = None
    if weights is not None and not merge_state:
        chunk_total = torch.empty(chunks.count, dtype=torch.float32, device=x.device)
    division = (chunks.tiles, chunks.longer, chunks.tail_rows, float(count))
    chunk_moments[(triton.cdiv(channels, configuration.tile_channels), chunks.count)](
        x,
        chunk_mean,
        chunk_m2,
        channels,
        x.stride(0),
        *division,
        weights,
        total,
        chunk_total,
        TILE_ROWS=configuration.tile_rows,
        TILE_CHANNELS=configuration.tile_channels,
        STAGES=configuration.stages,
        WHOLE_BLOCKS=channels % configuration.tile_channels == 0,
        MERGE_STATE=merge_state,
        EARLY_MERGE=early_merge,
        num_warps=configuration.warps,
    )
    if merge_state:
        return
    merge_chunks[(triton.cdiv(channels, MERGE_CHANNELS),)](
        chunk_mean,
        chunk_m2,
        mean,
        m2,
        channels,
        chunks.count,
        *division,
        total,
        chunk_total,
        TILE_ROWS=configuration.tile_rows,
        GROUP=MERGE_GROUP,
        BLOCK_CHANNELS=MERGE_CHANNELS,
        EARLY_MERGE=early_merge,
        num_warps=MERGE_WARPS,
        launch_pdl=early_merge,
    )
