#pragma once

// The device part of hessian.cu.

#include <cuda_runtime.h>

#include <cstdint>

#include "hessian_plan.cuh"
#include "hopper.cuh"

namespace pyprune {
namespace {

// The triangle is cut into tiles of 256 x 256, the rows of X into chunks; a unit of work is a tile's share of a chunk.
// A cluster of two blocks takes a unit: both need the tile's 256 columns, so each loads half of them for both (half the
// reads from L2), and has 128 of its rows to itself. Of those a warpgroup takes a band of 64, in one 64 x 256 product.
//
// On the diagonal, band b of a tile needs 64 (b + 1) columns only, and its rows are among those columns. Block 0 takes
// bands 0 and 3, block 1 takes bands 1 and 2: 5/8 of the work of another tile for each, and no rows to load.
constexpr int BAND = 64;
constexpr int BOX = 64;  // columns of X that lie together in shared memory: 128 bytes, the width of the swizzle
constexpr int BANDS = TILE / BAND;
constexpr int BOXES = TILE / BOX;
constexpr int BLOCKS = 2;  // of a cluster
constexpr int BLOCK_BOXES = BOXES / BLOCKS;

constexpr int WARP = 32;
constexpr int GROUP_WARPS = 4;
constexpr int GROUPS = 2;  // warpgroups of a block that multiply
// Then one warp loads, and one for each group sees to it that the chunks of a tile are added one after the other.
constexpr int LOADER_WARP = GROUPS * GROUP_WARPS;
constexpr int THREADS = (LOADER_WARP + 1 + GROUPS) * WARP;

constexpr int STAGES = 4;  // of the ring in shared memory

// Sums reach the Hessian through two buffers per group, each 64 rows of 32 floats, which the copy engine adds. H200,
// bf16, ms of an update:
//                               32768 x 4096    x 5120    x 8192   x 11008   x 13824   16384 x 28672
//   chunks of 4096 rows *              0.835     1.296     3.314     6.066     9.608          20.676
//   chunks of 3072 rows                0.853     1.318     3.398     6.234     9.870          21.511
//   the same, never flushed *          0.775     1.205     3.092     5.665     9.008          19.653
//   better plain cuBLAS                1.503     2.406     6.410    11.622    18.223          39.204
// * with one group a stage behind the other, which made the second line 0 to 2 % slower; starting the chunks of
// different tiles apart changed that by -2 to 1 %. Slower, in an earlier run: chunks of 2048 and 1536 rows by 4 to
// 10 %, adds from registers by 5 to 12 %. Chunks of 4096 rows lose 1.0e-5 of the diagonal, of 3072 three quarters of it.
constexpr int FLUSH_COLUMNS = 32;
constexpr int FLUSH_BUFFER_BYTES = BAND * FLUSH_COLUMNS * 4;
// Units announced ahead: the loader is at most STAGES units ahead of a group, and a group's helper one behind it.
constexpr int ANNOUNCED_UNITS = 16;

struct Layout {
  static constexpr int BOX_BYTES = STAGE_ROWS * BOX * 2;
  static constexpr int ROW_BOXES_BYTES = BLOCK_BOXES * BOX_BYTES;
  static constexpr int STAGE_BYTES = ROW_BOXES_BYTES + BOXES * BOX_BYTES;  // this block's rows, then the columns
  static constexpr int FLUSH_BUFFERS = STAGES * STAGE_BYTES;
  static constexpr int FULL = FLUSH_BUFFERS + GROUPS * 2 * FLUSH_BUFFER_BYTES;
  static constexpr int EMPTY = FULL + STAGES * 8;
  static constexpr int ANNOUNCED = EMPTY + STAGES * 8;
  static constexpr int UNITS = static_cast<int>(ceil_div(ANNOUNCED + ANNOUNCED_UNITS * 8, 16) * 16);
  static constexpr int BYTES = UNITS + ANNOUNCED_UNITS * 16;
  // Of rows with weights: those of each stage.
  static constexpr int WEIGHTS = static_cast<int>(ceil_div(BYTES, 128) * 128);
  static constexpr int WEIGHTS_BYTES = STAGE_ROWS * 4;
  static constexpr int WEIGHTED_BYTES = WEIGHTS + STAGES * WEIGHTS_BYTES;
  static_assert(WEIGHTED_BYTES <= 227 * 1024);
  static_assert(ANNOUNCED_UNITS >= STAGES + 3);
};

// The workspace, zeroed before every launch.
struct Workspace {
  uint32_t next_unit;
  uint32_t unused[3];
  uint32_t chunks_added[][BANDS];  // of each tile, by block and group
};

struct Arguments {
  Plan plan;
  int channels;
  float* sums;
  Workspace* workspace;
  HessianWeights weights;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int GROUP = GROUP_WARPS * WARP;

// Named barriers; 0 is __syncthreads.
constexpr int MAY_ADD = 1;                              // one for each group
constexpr int ADDED = MAY_ADD + GROUPS;                 // one for each group
constexpr int BUFFER_EMPTY = ADDED + GROUPS;            // two for each group
constexpr int BUFFER_FULL = BUFFER_EMPTY + 2 * GROUPS;  // two for each group
constexpr int WEIGHED = BUFFER_FULL + 2 * GROUPS;       // one for each group
constexpr int GROUP_AND_HELPER = GROUP + WARP;

// A place in the ring of stages, and the parity of the phase that fills it.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Shared {
  uint32_t base;

  __device__ uint32_t full(int stage) const { return base + Layout::FULL + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + Layout::EMPTY + stage * 8; }
  __device__ uint32_t announced(int slot) const { return base + Layout::ANNOUNCED + slot * 8; }
  __device__ uint32_t unit(int slot) const { return base + Layout::UNITS + slot * 16; }
  __device__ uint32_t row_box(int stage, int box) const {
    return base + stage * Layout::STAGE_BYTES + box * Layout::BOX_BYTES;
  }
  __device__ uint32_t weights(int stage) const { return base + Layout::WEIGHTS + stage * Layout::WEIGHTS_BYTES; }
  __device__ uint32_t column_box(int stage, int box) const { return row_box(stage, BLOCK_BOXES + box); }
  __device__ uint32_t flush_buffer(int group, int buffer) const {
    return base + Layout::FLUSH_BUFFERS + (group * 2 + buffer) * FLUSH_BUFFER_BYTES;
  }
};

// The n-th unit of a cluster lies in slot n % ANNOUNCED_UNITS of both of its blocks. No slot is announced anew before
// all have read it: the loader waits for stages, hence for the groups, and they for the helpers.
__device__ void announce(const Shared& shared, uint32_t n, const Unit& unit) {
  const int slot = n % ANNOUNCED_UNITS;
  for (int block = 0; block < BLOCKS; ++block) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(in_block(shared.unit(slot), block)),
                 "r"(unit.tile_row), "r"(unit.tile_column), "r"(unit.first_step), "r"(unit.chunk << 8 | unit.steps)
                 : "memory");
    barrier_arrive_after_stores(shared.announced(slot), block);
  }
}

__device__ Unit announced_unit(const Shared& shared, uint32_t n) {
  const int slot = n % ANNOUNCED_UNITS;
  barrier_wait_for_stores(shared.announced(slot), n / ANNOUNCED_UNITS % 2);
  Unit unit;
  uint32_t chunk_and_steps;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(unit.tile_row), "=r"(unit.tile_column), "=r"(unit.first_step), "=r"(chunk_and_steps)
               : "r"(shared.unit(slot))
               : "memory");
  unit.steps = chunk_and_steps & 0xff;
  unit.chunk = chunk_and_steps >> 8;
  return unit;
}

__device__ Unit dealt_unit(const Plan& plan, uint32_t ticket) {
  return ticket < static_cast<uint32_t>(plan.units()) ? plan.unit(ticket) : Unit();
}

// One thread of each block. Block 0's also deals the units: in order, so that whoever waits for an earlier chunk of a
// tile waits for a cluster that is already at work on it.
template <bool WEIGHTED>
__device__ void load(const Shared& shared, const CUtensorMap& x, const CUtensorMap& weights, const Arguments& arguments,
                     int block) {
  uint32_t* const next_unit = &arguments.workspace->next_unit;
  constexpr uint16_t BOTH_BLOCKS = (1 << BLOCKS) - 1;
  prefetch_map(x);
  if (block == 0) announce(shared, 0, dealt_unit(arguments.plan, atomicAdd(next_unit, 1)));
  Ring ring;
  for (uint32_t n = 0;; ++n) {
    const Unit unit = announced_unit(shared, n);
    if (unit.steps == 0) return;
    const uint32_t ticket = block == 0 ? atomicAdd(next_unit, 1) : 0;
    const bool diagonal = unit.diagonal();
    const int own_column = unit.tile_row * TILE + block * BLOCK_BOXES * BOX;
    const int first_box = block * BLOCK_BOXES;
    for (int step = 0; step < unit.steps; ++step, ring.advance()) {
      const int row = (unit.first_step + step) * STAGE_ROWS;
      const uint32_t full = shared.full(ring.stage);
      barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      constexpr int WEIGHTS_BYTES = WEIGHTED ? Layout::WEIGHTS_BYTES : 0;
      barrier_arrive_expecting(full, (diagonal ? BOXES * Layout::BOX_BYTES : Layout::STAGE_BYTES) + WEIGHTS_BYTES);
      if constexpr (WEIGHTED) {
        load_stretch(shared.weights(ring.stage), weights, row, full);
      }
#pragma unroll
      for (int box = first_box; box < first_box + BLOCK_BOXES; ++box) {
        load_box_into(BOTH_BLOCKS, shared.column_box(ring.stage, box), x, unit.tile_column * TILE + box * BOX, row,
                      full);
      }
      if (!diagonal) {
#pragma unroll
        for (int box = 0; box < BLOCK_BOXES; ++box) {
          load_box(shared.row_box(ring.stage, box), x, own_column + box * BOX, row, full);
        }
      }
    }
    if (block == 0) announce(shared, n + 1, dealt_unit(arguments.plan, ticket));
  }
}

// Band of a diagonal tile, by block and group: 0 and 3, 1 and 2.
__device__ int diagonal_band(int block, int group) { return group == 0 ? block : BANDS - 1 - block; }

__device__ float2 unpack(uint32_t pair, __nv_bfloat16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ float2 unpack(uint32_t pair, __half) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }

__device__ uint32_t pack(float2 pair, __nv_bfloat16) {
  const __nv_bfloat162 packed = __float22bfloat162_rn(pair);
  return reinterpret_cast<const uint32_t&>(packed);
}
__device__ uint32_t pack(float2 pair, __half) {
  const __half2 packed = __float22half2_rn(pair);
  return reinterpret_cast<const uint32_t&>(packed);
}

__device__ float load_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// A group sums the 64 columns of one box, a warp 16 of them, a lane 8 of them over every 16th row.
template <typename Element>
struct ColumnSums {
  static constexpr int ROW_LANES = 16;
  float sums[8] = {};

  // Eight lanes read at a time, 16 bytes each: of four rows whose swizzled groups lie in different banks.
  static __device__ int row(int lane) { return lane / 2 % 4 * 2 + lane / 8 % 2 + lane / 16 * 8; }
  static __device__ int group16(int warp, int lane) { return warp * 2 + lane % 2; }

  // weights: those of the rows, if they have any.
  template <bool WEIGHTED>
  __device__ void add(uint32_t box, uint32_t weights, int warp, int lane) {
#pragma unroll
    for (int r = row(lane); r < STAGE_ROWS; r += ROW_LANES) {
      uint32_t pairs[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                   : "r"(box + r * 128 + (group16(warp, lane) ^ r % 8) * 16)
                   : "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack(pairs[i], Element());
        if constexpr (WEIGHTED) {
          const float weight = load_shared(weights + r * 4);
          sums[2 * i] += weight * pair.x;
          sums[2 * i + 1] += weight * pair.y;
        } else {
          sums[2 * i] += pair.x;
          sums[2 * i + 1] += pair.y;
        }
      }
    }
  }

  __device__ void add_to(float* global, int first_column, int channels, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int offset = 2; offset < WARP; offset *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
    }
    const int column = first_column + group16(warp, lane) * 8;
    if (lane < 2 && column < channels) {
#pragma unroll
      for (int i = 0; i < 8; ++i) add_to_global(global + column + i, sums[i]);
    }
  }
};

// What a thread of a multiplying group knows of itself.
struct Worker {
  int block;
  int group;
  int warp;  // of the group
  int lane;

  // Of a band, what a product's first and third element belong to.
  __device__ int row() const { return warp * 16 + lane / 4; }
};

// Times their weights, the rows of a box, by the group that alone multiplies with the result; `to` may be `from`.
// A second operand in registers would save shared memory's bandwidth, but with 128 registers of sums ptxas (CUDA 13.0)
// finds too few for it and has the products wait for each other.
template <typename Element>
__device__ __forceinline__ void weigh(uint32_t to, uint32_t from, uint32_t weights, const Worker& me) {
  constexpr int VECTORS = BOX * 2 / 16;  // of a row
  const int thread = me.warp * WARP + me.lane;
#pragma unroll
  for (int v = thread; v < STAGE_ROWS * VECTORS; v += GROUP) {
    uint32_t pairs[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(from + v * 16)
                 : "memory");
    const float weight = load_shared(weights + v / VECTORS * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack(pairs[i], Element());
      pairs[i] = pack(make_float2(pair.x * weight, pair.y * weight), Element());
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + v * 16), "r"(pairs[0]), "r"(pairs[1]),
                 "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
  }
  copy_engine_fence_for_shared();
  named_sync(WEIGHED + me.group, GROUP);
}

// Into the buffers, 32 columns at a time; the helper hands them on. Rows of 128 bytes, swizzled as in the map.
template <int N>
__device__ __forceinline__ void flush(const float (&sum)[N / 2], const Worker& me, const Shared& shared) {
#pragma unroll
  for (int slice = 0; slice < N / FLUSH_COLUMNS; ++slice) {
    const int buffer = slice % 2;
    const int barriers = me.group * 2 + buffer;
    named_sync(BUFFER_EMPTY + barriers, GROUP_AND_HELPER);
    const uint32_t to = shared.flush_buffer(me.group, buffer) + me.row() * 128 + me.lane % 2 * 8;
#pragma unroll
    for (int j = 0; j < FLUSH_COLUMNS / 8; ++j) {
      const uint32_t swizzled = to + ((2 * j + me.lane % 4 / 2) ^ me.lane / 4) * 16;
      const float* const s = sum + slice * (FLUSH_COLUMNS / 2) + 4 * j;
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(swizzled), "f"(s[0]), "f"(s[1]) : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(swizzled + 8 * 128), "f"(s[2]), "f"(s[3]) : "memory");
    }
    copy_engine_fence_for_shared();
    named_arrive(BUFFER_FULL + barriers, GROUP_AND_HELPER);
  }
}

// A group's part of one unit: 64 rows by the tile's first N columns.
template <typename Element, int N, bool DIAGONAL, bool WEIGHTED>
__device__ __forceinline__ void multiply(const Shared& shared, Ring& ring, const Unit& unit, const Worker& me,
                                         const Arguments& arguments) {
  constexpr int PRODUCT_ROWS = 16;
  const int own_box = me.block * BLOCK_BOXES + me.group;
  const bool with_sums = DIAGONAL && arguments.sums != nullptr;
  ColumnSums<Element> column_sums;
  float sum[N / 2] = {};
  int done_stage = 0;

  // Both blocks must know that a stage has been read, since each loads half of its columns.
  const auto release = [&](int stage) {
    if (me.lane < BLOCKS) barrier_arrive_in_block(shared.empty(stage), me.lane);
  };

  for (int step = 0; step < unit.steps; ++step, ring.advance()) {
    const int stage = ring.stage;
    barrier_wait(shared.full(stage), ring.parity);
    uint32_t rows = DIAGONAL ? shared.column_box(stage, N / BAND - 1) : shared.row_box(stage, me.group);
    if constexpr (WEIGHTED) {
      // On the diagonal the rows are columns too, of both groups, and the place of other tiles' rows is free.
      weigh<Element>(shared.row_box(stage, me.group), rows, shared.weights(stage), me);
      rows = shared.row_box(stage, me.group);
    }
    const uint64_t a = product_operand(rows, Layout::BOX_BYTES);
    const uint64_t b = product_operand(shared.column_box(stage, 0), Layout::BOX_BYTES);
    products_begin();
#pragma unroll
    for (int r = 0; r < STAGE_ROWS; r += PRODUCT_ROWS) {
      const uint64_t offset = r * BOX * 2 / 16;
      product_async<Element, N>(sum, a + offset, b + offset);
    }
    products_commit();
    if (with_sums) {
      column_sums.template add<WEIGHTED>(shared.column_box(stage, own_box), shared.weights(stage), me.warp, me.lane);
      __syncwarp();
    }
    if (step > 0) {
      products_wait<1>();
      release(done_stage);
    }
    done_stage = stage;
  }
  products_wait<0>();
  products_are_done(sum);
  release(done_stage);

  if constexpr (WEIGHTED) {
    const float factor = arguments.weights.factor == nullptr ? 1.0f : *arguments.weights.factor;
#pragma unroll
    for (float& element : sum) element *= factor;
#pragma unroll
    for (float& column : column_sums.sums) column *= factor;
  }
  flush<N>(sum, me, shared);
  if (with_sums) {
    named_sync(MAY_ADD + me.group, GROUP_AND_HELPER);
    column_sums.add_to(arguments.sums, unit.tile_column * TILE + own_box * BOX, arguments.channels, me.warp, me.lane);
    named_arrive(ADDED + me.group, GROUP_AND_HELPER);
  }
}

template <typename Element, bool WEIGHTED>
__device__ void multiply_all(const Shared& shared, const Arguments& arguments, const Worker& me) {
  Ring ring;
  for (uint32_t n = 0;; ++n) {
    const Unit unit = announced_unit(shared, n);
    if (unit.steps == 0) return;
    if (!unit.diagonal()) {
      multiply<Element, TILE, false, WEIGHTED>(shared, ring, unit, me, arguments);
      continue;
    }
    switch (diagonal_band(me.block, me.group)) {
      case 0: multiply<Element, BAND, true, WEIGHTED>(shared, ring, unit, me, arguments); break;
      case 1: multiply<Element, 2 * BAND, true, WEIGHTED>(shared, ring, unit, me, arguments); break;
      case 2: multiply<Element, 3 * BAND, true, WEIGHTED>(shared, ring, unit, me, arguments); break;
      default: multiply<Element, 4 * BAND, true, WEIGHTED>(shared, ring, unit, me, arguments); break;
    }
  }
}

// Hands the buffers of one unit to the copy engine, and returns when all is added.
__device__ void add_boxes(const Shared& shared, const CUtensorMap& lower, const Unit& unit, int block, int group,
                          int lane) {
  const int band = unit.diagonal() ? diagonal_band(block, group) : block * BLOCK_BOXES + group;
  const int slices = (unit.diagonal() ? (band + 1) * BAND : TILE) / FLUSH_COLUMNS;
  for (int slice = 0; slice < slices; ++slice) {
    const int buffer = slice % 2;
    named_sync(BUFFER_FULL + group * 2 + buffer, GROUP_AND_HELPER);
    if (lane == 0) {
      add_box(lower, unit.tile_column * TILE + slice * FLUSH_COLUMNS, unit.tile_row * TILE + band * BAND,
              shared.flush_buffer(group, buffer));
    }
    if (slice > 0 && slice + 1 < slices) {
      if (lane == 0) wait_for_reads_of_boxes<1>();
      __syncwarp();
      named_arrive(BUFFER_EMPTY + group * 2 + (1 - buffer), GROUP_AND_HELPER);
    }
  }
  if (lane == 0) {
    wait_for_added_boxes();
    copy_engine_fence();
  }
  __syncwarp();
}

// A warp beside each group: lets the group add its sums once those of the tile's earlier chunks are there, and says so
// when they are.
__device__ void help(const Shared& shared, const CUtensorMap& lower, const Arguments& arguments, int block, int group,
                     int lane) {
  for (uint32_t n = 0;; ++n) {
    const Unit unit = announced_unit(shared, n);
    if (unit.steps == 0) return;
    uint32_t* const added = &arguments.workspace->chunks_added[unit.tile()][block * GROUPS + group];
    named_arrive(BUFFER_EMPTY + group * 2, GROUP_AND_HELPER);
    named_arrive(BUFFER_EMPTY + group * 2 + 1, GROUP_AND_HELPER);
    if (lane == 0) {
      while (load_acquire(added) != static_cast<uint32_t>(unit.chunk)) __nanosleep(100);
      copy_engine_fence();
    }
    __syncwarp();
    add_boxes(shared, lower, unit, block, group, lane);
    if (unit.diagonal() && arguments.sums != nullptr) {
      named_arrive(MAY_ADD + group, GROUP_AND_HELPER);
      named_sync(ADDED + group, GROUP_AND_HELPER);
    }
    if (lane == 0) store_release(added, unit.chunk + 1);
    __syncwarp();
  }
}

#endif

// A persistent grid of clusters of two blocks.
template <typename Element, bool WEIGHTED>
__global__ void __launch_bounds__(THREADS, 1)
    accumulate_hessian(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap lower,
                       const __grid_constant__ Arguments arguments, const __grid_constant__ CUtensorMap weights) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared shared = {shared_address(memory)};
  const int block = block_rank_in_cluster();
  const int warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
  const int lane = threadIdx.x % WARP;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), BLOCKS * GROUPS * GROUP_WARPS);
    }
    for (int slot = 0; slot < ANNOUNCED_UNITS; ++slot) barrier_init(shared.announced(slot), 1);
    barrier_init_done();
  }
  cluster_sync();

  if (warp < LOADER_WARP) {
    multiply_all<Element, WEIGHTED>(shared, arguments, {block, warp / GROUP_WARPS, warp % GROUP_WARPS, lane});
  } else if (warp == LOADER_WARP) {
    if (lane == 0) load<WEIGHTED>(shared, x, weights, arguments, block);
    __syncwarp();
  } else {
    help(shared, lower, arguments, block, warp - LOADER_WARP - 1, lane);
  }
  // No block leaves while the other may still write into its memory.
  cluster_sync();
#endif
}

}  // namespace
}  // namespace pyprune
