#include "../channel_moments_block.h"

#include "vector.h"

namespace pyprune::PYPRUNE_ISA {
namespace {

// A power-of-two stride puts all rows of a tile into one set of the first-level cache, which has 8 ways.
constexpr int TILE_ROWS = 8;

// The last vector of a block may reach past its columns, and perhaps past the end of the memory.
template <typename T>
Vector load_first(const T* x, int lanes) {
  T padded[VECTOR_WIDTH] = {};
  std::memcpy(padded, x, lanes * sizeof(T));
  return load(padded);
}

// What rows count: one each, or their weights.
struct MergeWeights {
  float tile_inverse;  // 1 / (rows in the tile)
  float mean;          // rows in the tile / rows so far, the tile's included
  float m2;            // rows before * rows in the tile / rows so far
};

MergeWeights merge_weights(double before, double tile) {
  if (tile == 0) return {};
  const double total = before + tile;
  return {static_cast<float>(1.0 / tile), static_cast<float>(tile / total), static_cast<float>(before * tile / total)};
}

// The weights of the rows of a tile.
struct RowsOfOne {
  double total(int rows) const { return rows; }
  Vector times(Vector x, int) const { return x; }
};

struct WeightedRows {
  float squares[TILE_ROWS];

  WeightedRows(const float* roots, int rows) : squares{} {
    for (int r = 0; r < rows; ++r) squares[r] = roots[r] * roots[r];
  }
  double total(int rows) const {
    double sum = 0;
    for (int r = 0; r < rows; ++r) sum += squares[r];
    return sum;
  }
  Vector times(Vector x, int row) const { return x * squares[row]; }
};

// Centres the tile on its own mean, then merges it (Chan, Golub, LeVeque 1979): neither a large mean nor
// an outlier in the first row costs digits.
template <typename TileWeights>
inline void merge_tile(const Vector* tile, int tile_rows, const TileWeights& rows, const MergeWeights& weights,
                       float* mean, float* m2) {
  Vector sum = rows.times(tile[0], 0);
#pragma GCC unroll 8
  for (int r = 1; r < tile_rows; ++r) sum += rows.times(tile[r], r);
  const Vector tile_mean = sum * weights.tile_inverse;
  Vector squares = {};
#pragma GCC unroll 8
  for (int r = 0; r < tile_rows; ++r) {
    const Vector deviation = tile[r] - tile_mean;
    squares += rows.times(deviation, r) * deviation;
  }
  const Vector running_mean = load(mean);
  const Vector delta = tile_mean - running_mean;
  const Vector new_mean = running_mean + delta * weights.mean;
  const Vector new_m2 = load(m2) + (squares + delta * delta * weights.m2);
  std::memcpy(mean, &new_mean, sizeof(Vector));
  std::memcpy(m2, &new_m2, sizeof(Vector));
}

// TILE_ROWS rows; columns is a multiple of VECTOR_WIDTH.
template <typename T, typename TileWeights>
void add_whole_tile(const T* x, int64_t row_stride, int columns, const TileWeights& rows, const MergeWeights& weights,
                    float* mean, float* m2) {
  for (int c = 0; c < columns; c += VECTOR_WIDTH) {
    Vector tile[TILE_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r] = load(x + r * row_stride + c);
      // The next tile, into the second level: a column block is too short for the hardware to foresee it
      // (65536 x 288 bf16, one thread: 5.2 to 14.3 GB/s), and the first level has no way to spare.
      __builtin_prefetch(x + (TILE_ROWS + r) * row_stride + c, 0, 2);
    }
    merge_tile(tile, TILE_ROWS, rows, weights, mean + c, m2 + c);
  }
}

// Any number of rows up to TILE_ROWS, any number of columns.
template <typename T, typename TileWeights>
void add_ragged_tile(const T* x, int tile_rows, int64_t row_stride, int columns, const TileWeights& rows,
                     const MergeWeights& weights, float* mean, float* m2) {
  for (int c = 0; c < columns; c += VECTOR_WIDTH) {
    Vector tile[TILE_ROWS] = {};
    const int lanes = columns - c < VECTOR_WIDTH ? columns - c : VECTOR_WIDTH;
    for (int r = 0; r < tile_rows; ++r) tile[r] = load_first(x + r * row_stride + c, lanes);
    merge_tile(tile, tile_rows, rows, weights, mean + c, m2 + c);
  }
}

// tile_weights(row, rows): those of a tile's rows.
template <typename T, typename TileWeights>
void add_tiles(const T* x, int64_t rows, int64_t row_stride, int columns, const TileWeights& tile_weights, float* mean,
               float* m2) {
  double before = 0;
  for (int64_t row = 0; row < rows; row += TILE_ROWS) {
    const T* base = x + row * row_stride;
    const int tile_rows = rows - row < TILE_ROWS ? static_cast<int>(rows - row) : TILE_ROWS;
    const auto tile = tile_weights(row, tile_rows);
    const double total = tile.total(tile_rows);
    const MergeWeights weights = merge_weights(before, total);
    const int in_vectors = tile_rows == TILE_ROWS ? columns - columns % VECTOR_WIDTH : 0;
    add_whole_tile(base, row_stride, in_vectors, tile, weights, mean, m2);
    add_ragged_tile(base + in_vectors, tile_rows, row_stride, columns - in_vectors, tile, weights, mean + in_vectors,
                    m2 + in_vectors);
    before += total;
  }
}

template <typename T>
void moments_of_block(const void* x, const float* roots, int64_t rows, int64_t row_stride, int columns, float* mean,
                      float* m2) {
  for (int c = 0; c < columns; c += VECTOR_WIDTH) {
    std::memset(mean + c, 0, sizeof(Vector));
    std::memset(m2 + c, 0, sizeof(Vector));
  }
  const T* values = static_cast<const T*>(x);
  if (roots == nullptr) {
    add_tiles(values, rows, row_stride, columns, [](int64_t, int) { return RowsOfOne{}; }, mean, m2);
  } else {
    const auto weights = [=](int64_t row, int tile_rows) { return WeightedRows(roots + row, tile_rows); };
    add_tiles(values, rows, row_stride, columns, weights, mean, m2);
  }
}

}  // namespace

extern const BlockMomentsTable block_moments = {moments_of_block<float>, moments_of_block<BFloat16>,
                                                moments_of_block<Float16>};

}  // namespace pyprune::PYPRUNE_ISA
