#include "../channel_moments_block.h"

#include "vector.h"

namespace pyprune::PYPRUNE_ISA {
namespace {

constexpr int TILE_ROWS = 16;

// The last vector of a block may reach past its columns, and perhaps past the end of the memory.
template <typename T>
Vector load_first(const T* x, int lanes) {
  T padded[VECTOR_WIDTH] = {};
  std::memcpy(padded, x, lanes * sizeof(T));
  return load(padded);
}

struct Weights {
  float tile_inverse;  // 1 / (rows in the tile)
  float mean;          // rows in the tile / rows so far, the tile's included
  float m2;            // rows before * rows in the tile / rows so far
};

Weights merge_weights(int64_t before, int tile) {
  const double total = static_cast<double>(before) + tile;
  return {static_cast<float>(1.0 / tile), static_cast<float>(tile / total),
          static_cast<float>(static_cast<double>(before) * tile / total)};
}

// Centres the tile on its own mean, then merges it (Chan, Golub, LeVeque 1979): neither a large mean nor
// an outlier in the first row costs digits.
inline void merge_tile(const Vector* tile, int tile_rows, const Weights& weights, float* mean, float* m2) {
  Vector sum = tile[0];
  for (int r = 1; r < tile_rows; ++r) sum += tile[r];
  const Vector tile_mean = sum * weights.tile_inverse;
  Vector squares = {};
  for (int r = 0; r < tile_rows; ++r) {
    const Vector deviation = tile[r] - tile_mean;
    squares += deviation * deviation;
  }
  const Vector running_mean = load(mean);
  const Vector delta = tile_mean - running_mean;
  const Vector new_mean = running_mean + delta * weights.mean;
  const Vector new_m2 = load(m2) + (squares + delta * delta * weights.m2);
  std::memcpy(mean, &new_mean, sizeof(Vector));
  std::memcpy(m2, &new_m2, sizeof(Vector));
}

template <typename T>
void moments_of_block(const void* x, int64_t rows, int64_t row_stride, int columns, float* mean, float* m2) {
  const int whole = columns - columns % VECTOR_WIDTH;
  for (int c = 0; c < columns; c += VECTOR_WIDTH) {
    std::memset(mean + c, 0, sizeof(Vector));
    std::memset(m2 + c, 0, sizeof(Vector));
  }
  Vector tile[TILE_ROWS];
  for (int64_t row = 0; row < rows; row += TILE_ROWS) {
    const T* base = static_cast<const T*>(x) + row * row_stride;
    const int tile_rows = rows - row < TILE_ROWS ? static_cast<int>(rows - row) : TILE_ROWS;
    const Weights weights = merge_weights(row, tile_rows);
    for (int c = 0; c < whole; c += VECTOR_WIDTH) {
      if (tile_rows == TILE_ROWS) {
        for (int r = 0; r < TILE_ROWS; ++r) tile[r] = load(base + r * row_stride + c);
        merge_tile(tile, TILE_ROWS, weights, mean + c, m2 + c);
      } else {
        for (int r = 0; r < tile_rows; ++r) tile[r] = load(base + r * row_stride + c);
        merge_tile(tile, tile_rows, weights, mean + c, m2 + c);
      }
    }
    if (whole < columns) {
      for (int r = 0; r < tile_rows; ++r) tile[r] = load_first(base + r * row_stride + whole, columns - whole);
      merge_tile(tile, tile_rows, weights, mean + whole, m2 + whole);
    }
  }
}

}  // namespace

extern const BlockMomentsTable block_moments = {moments_of_block<float>, moments_of_block<BFloat16>,
                                                moments_of_block<Float16>};

}  // namespace pyprune::PYPRUNE_ISA
