#pragma once

#include <cuda_fp16.h>

#include <cstdint>

// How a warp reads a strip of columns, 16 bytes of a row a lane, tile by tile: a tile's elements end in the
// registers of the lanes that own the columns.
namespace pyprune {

constexpr int WARP = 32;
constexpr int VECTOR_BYTES = 16;  // the widest load of a lane
// A tile is centred on its own mean and then merged: 8 rows spread the cost of a merge, and 8 rows of 16 bytes
// (32 registers) fit beside the moments without spills.
constexpr int TILE_ROWS = 8;
constexpr int TILE_VECTORS = TILE_ROWS * WARP;

struct BFloat16 {
  uint16_t bits;
};

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __device__ float to_float(__half x) { return __half2float(x); }

// Reads a strip whose rows all start on 16 bytes, a lane's columns side by side, through a ring in shared
// memory. A lane reads only what it copied itself: its own copies are all that it waits for.
template <typename T>
struct RingReader {
  using Element = T;
  using Row = uint4;
  static constexpr int COLUMNS = VECTOR_BYTES / sizeof(T);
  static constexpr int STEP = 1;  // between a lane's columns
  static constexpr int STAGES = 4;  // tiles in the ring, all but one of them in flight
  static constexpr int WARP_SHARED_BYTES = STAGES * TILE_VECTORS * VECTOR_BYTES;

  const T* x;  // the row to copy next
  int64_t row_stride;
  int tiles_left;
  uint4* ring;
  int stage = 0;
  uint64_t policy;  // lines of x leave L2 before any others

  static __device__ int first_column(int strip, int lane) { return (strip * WARP + lane) * COLUMNS; }

  __device__ RingReader(const T* x, int64_t row_stride, int tiles, int skip, int /*columns_left*/)
      : x(x), row_stride(row_stride), tiles_left(tiles) {
    extern __shared__ uint4 shared[];
    ring = shared + threadIdx.x / WARP * STAGES * TILE_VECTORS + threadIdx.x % WARP;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    copy(0, skip);
#pragma unroll
    for (int s = 1; s < STAGES - 1; ++s) copy(s, 0);
  }

  // Starts to copy the next tile. Past the last one the group is empty, so that groups count tiles.
  __device__ void copy(int stage, int skip) {
    if (tiles_left-- > 0) {
#pragma unroll
      for (int r = 0; r < TILE_ROWS; ++r) {
        const void* from = x + r * row_stride;
        const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(ring + stage * TILE_VECTORS + r * WARP));
        if (r < skip) continue;
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
                     : "memory");
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    x += TILE_ROWS * row_stride;
  }

  // The next tile; its first `skip` rows are zero.
  __device__ void next(Row (&tile)[TILE_ROWS], int skip) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) tile[r] = r >= skip ? ring[stage * TILE_VECTORS + r * WARP] : Row{};
    copy(stage == 0 ? STAGES - 1 : stage - 1, 0);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  static __device__ float value(const Row& row, int j) {
    const uint32_t word = (&row.x)[j * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    const uint16_t bits = j % 2 == 0 ? word & 0xffff : word >> 16;
    return to_float(reinterpret_cast<const T&>(bits));
  }

  static __device__ void store(float* to, const float (&values)[COLUMNS], int /*columns_left*/) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 4) {
      *reinterpret_cast<float4*>(to + j) = make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]);
    }
  }
};

// Reads any other strip element by element into registers, neighbouring columns by neighbouring lanes.
template <typename T>
struct ElementReader {
  using Element = T;
  static constexpr int COLUMNS = VECTOR_BYTES / sizeof(T);
  static constexpr int STEP = WARP;
  static constexpr int WARP_SHARED_BYTES = 0;
  struct Row {
    T x[COLUMNS];
  };

  const T* x;
  int64_t row_stride;
  int columns_left;

  static __device__ int first_column(int strip, int lane) { return strip * WARP * COLUMNS + lane; }

  __device__ ElementReader(const T* x, int64_t row_stride, int /*tiles*/, int /*skip*/, int columns_left)
      : x(x), row_stride(row_stride), columns_left(columns_left) {}

  __device__ void next(Row (&tile)[TILE_ROWS], int skip) {
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        tile[r].x[j] = r >= skip && j * STEP < columns_left ? x[r * row_stride + j * STEP] : T{};
      }
    }
    x += TILE_ROWS * row_stride;
  }

  static __device__ float value(const Row& row, int j) { return to_float(row.x[j]); }

  static __device__ void store(float* to, const float (&values)[COLUMNS], int columns_left) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (j * STEP < columns_left) to[j * STEP] = values[j];
    }
  }
};

}  // namespace pyprune
