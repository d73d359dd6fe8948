#pragma once

// What work the clusters of hessian_kernel.cuh do, in which order.

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "pyprune/hessian.h"

namespace pyprune {

constexpr int TILE = 256;
constexpr int STAGE_ROWS = 64;  // rows of X that are loaded together

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns and rows count in tiles, rows of X in stages.
struct Unit {
  int tile_row;
  int tile_column;
  int first_step;
  int steps;  // 0: there is no more work
  int chunk;

  __host__ __device__ bool diagonal() const { return tile_row == tile_column; }
  __host__ __device__ int64_t tile() const { return int64_t{tile_row} * (tile_row + 1) / 2 + tile_column; }
};

struct Plan {
  int tile_rows;
  int tiles;
  int steps;  // stages of X altogether
  int chunks;
  int chunk_steps;  // of every chunk but the last

  __host__ __device__ int units() const { return tiles * chunks; }
  __host__ __device__ Unit unit(int index) const;
};

// Chunk by chunk. Within a chunk the tiles go by stripes of 8 tile rows, down the columns of a stripe: the clusters
// then work on about 8 x 8 tiles at a time, which need few columns of X.
__host__ __device__ inline Unit Plan::unit(int index) const {
  constexpr int STRIPE_ROWS = 8;
  const int chunk = index / tiles;
  int t = index % tiles;
  const int begin = chunk * chunk_steps;
  const int end = begin + chunk_steps < steps ? begin + chunk_steps : steps;

  int before = 0;  // tile rows above the stripe, hence full columns in it
  int height = 0;
  for (;; before += STRIPE_ROWS) {
    height = tile_rows - before < STRIPE_ROWS ? tile_rows - before : STRIPE_ROWS;
    const int stripe_tiles = height * before + height * (height + 1) / 2;
    if (t < stripe_tiles) break;
    t -= stripe_tiles;
  }
  int row;
  int column;
  if (t < height * before) {
    column = t / height;
    row = before + t % height;
  } else {
    t -= height * before;
    column = before;
    for (int left = height; t >= left; --left, ++column) t -= left;
    row = column + t;
  }
  return {row, column, begin, end - begin, chunk};
}

// Chunks are as long as HESSIAN_CHUNK_ROWS allows, shorter only where clusters would be left without work.
inline Plan make_plan(int64_t rows, int64_t channels, int clusters) {
  constexpr int64_t MAX_CHUNK_STEPS = HESSIAN_CHUNK_ROWS / STAGE_ROWS;
  constexpr int64_t MIN_CHUNK_STEPS = 1024 / STAGE_ROWS;
  constexpr int64_t UNITS_PER_CLUSTER = 8;
  const int64_t tile_rows = ceil_div(channels, TILE);
  const int64_t tiles = tile_rows * (tile_rows + 1) / 2;
  const int64_t steps = ceil_div(rows, STAGE_ROWS);
  const int64_t wanted = ceil_div(UNITS_PER_CLUSTER * clusters, tiles);
  const int64_t wanted_chunks = std::max(ceil_div(steps, MAX_CHUNK_STEPS), std::min(wanted, steps / MIN_CHUNK_STEPS));
  const int64_t chunk_steps = ceil_div(steps, wanted_chunks);
  const int64_t chunks = ceil_div(steps, chunk_steps);
  if (tiles * chunks > INT32_MAX / 2) throw std::runtime_error("hessian: too many rows and channels for one update");
  return {static_cast<int>(tile_rows), static_cast<int>(tiles), static_cast<int>(steps), static_cast<int>(chunks),
          static_cast<int>(chunk_steps)};
}

}  // namespace pyprune
