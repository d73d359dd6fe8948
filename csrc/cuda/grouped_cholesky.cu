#include "pyprune/grouped_cholesky.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pyprune {
namespace {

constexpr int WARP = 32;
// A block of threads holds the triangle of one unit in registers, a square tile to a thread. The sweep takes the columns
// of one row of tiles at a time.
constexpr int MAX_TILE_ROWS = 32;
constexpr int MAX_THREADS = (MAX_TILE_ROWS * (MAX_TILE_ROWS + 1) / 2 + WARP - 1) / WARP * WARP;
// Tiles of 4 serve widths to 128 and tiles of 8 widths to 256. Smaller tiles put more threads on a matrix and shorten
// what one thread does alone, the sweep of a tile on the diagonal.
constexpr int SMALL_TILE = 4;
constexpr int LARGE_TILE = 8;
static_assert(LARGE_TILE * MAX_TILE_ROWS == GROUPED_CHOLESKY_CUDA_WIDTH);

// TILE columns by MAX_TILE_ROWS * TILE rows in shared memory. The rows of a tile stand in groups of 4, so that
// neighbouring tiles read neighbouring 16 bytes; 4 more places keep the groups of a tile in different banks.
template <int TILE>
struct Panel {
  static constexpr int GROUP = 4;
  float4 groups[TILE][TILE / GROUP][MAX_TILE_ROWS + 4];

  __device__ float& at(int column, int row) {
    return reinterpret_cast<float*>(&groups[column][row % TILE / GROUP][row / TILE])[row % GROUP];
  }

  __device__ void fetch(int column, int place, float (&rows)[TILE]) const {
#pragma unroll
    for (int r = 0; r < TILE; r += GROUP) {
      const float4 group = groups[column][r / GROUP][place];
      rows[r] = group.x;
      rows[r + 1] = group.y;
      rows[r + 2] = group.z;
      rows[r + 3] = group.w;
    }
  }
};

// What the threads of a block tell each other.
template <int TILE>
struct Exchange {
  // A_RK as its tiles have it: the rows before K from tiles of A_KR, [TILE, rows], those after it from tiles of A_RK,
  // [rows, TILE]. Rows of 12 floats, not 8, let 8 neighbours read 16 bytes each without a bank conflict.
  static constexpr int BEFORE_STRIDE = MAX_TILE_ROWS * TILE;
  static constexpr int AFTER_STRIDE = TILE == 8 ? 12 : TILE;
  alignas(16) float before[TILE][BEFORE_STRIDE];
  alignas(16) float after[MAX_TILE_ROWS * TILE][AFTER_STRIDE];
  Panel<TILE> panel;                               // W, and W D^-1
  Panel<TILE> scaled;
  alignas(16) float factor[TILE][TILE];            // U: what is below its diagonal
  alignas(16) float inverse[MAX_TILE_ROWS][TILE];  // 1 / D, of all columns so far

  // A row of W from one of A_RK or of -1: a forward substitution.
  __device__ void eliminate(int swept, int row) {
    const int first = swept * TILE;
    float w[TILE];
#pragma unroll
    for (int k = 0; k < TILE; ++k) {
      w[k] = row < first ? before[k][row] : row >= first + TILE ? after[row][k] : row == first + k ? -1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < k; ++j) w[k] -= factor[k][j] * w[j];
    }
#pragma unroll
    for (int k = 0; k < TILE; ++k) {
      panel.at(k, row) = w[k];
      scaled.at(k, row) = w[k] * inverse[swept][k];
    }
  }
};

// To one unit in the last place between 2^-126 and 2^126. A division's branch for all other numbers would cost registers
// that large tiles do not leave.
__device__ float reciprocal(float x) {
  const float estimate = __fdividef(1.0f, x);
  return estimate + estimate * (1.0f - x * estimate);
}

template <int TILE>
struct Tile {
  float x[TILE][TILE];

  // Element (row, column) of a unit's block, of which only the lower triangle is there. The block is
  // continued by the identity; above the diagonal there is zero.
  __device__ void load(const float* block, int64_t row_stride, int width, int first_row, int first_column) {
#pragma unroll
    for (int r = 0; r < TILE; ++r) {
#pragma unroll
      for (int c = 0; c < TILE; ++c) {
        const int row = first_row + r;
        const int column = first_column + c;
        x[r][c] = row == column ? 1.0f : 0.0f;
        if (row < width && column <= row) x[r][c] = block[row * row_stride + column];
      }
    }
  }

  // Factors a tile on the diagonal, of which only the lower triangle counts, and tells the others; it is used up. A pivot
  // that is not positive has a NaN for its inverse, which reaches the unit's error whatever G is.
  __device__ void factor(Exchange<TILE>& exchange, int place) {
#pragma unroll
    for (int k = 0; k < TILE; ++k) {
      const float inverse = x[k][k] > 0.0f ? reciprocal(x[k][k]) : nanf("");
      exchange.inverse[place][k] = inverse;
#pragma unroll
      for (int i = k + 1; i < TILE; ++i) {
        const float scaled = x[i][k] * inverse;
        exchange.factor[i][k] = scaled;
#pragma unroll
        for (int j = i; j < TILE; ++j) x[j][i] -= x[j][k] * scaled;
      }
    }
  }

  __device__ void store(float* rows, int row_stride) const {
    constexpr int GROUP = 4;
#pragma unroll
    for (int r = 0; r < TILE; ++r) {
#pragma unroll
      for (int c = 0; c < TILE; c += GROUP) {
        const float4 group = make_float4(x[r][c], x[r][c + 1], x[r][c + 2], x[r][c + 3]);
        *reinterpret_cast<float4*>(rows + r * row_stride + c) = group;
      }
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < TILE; ++r) {
#pragma unroll
      for (int c = 0; c < TILE; ++c) x[r][c] = 0.0f;
    }
  }

  __device__ void subtract(const Exchange<TILE>& exchange, int row_place, int column_place) {
#pragma unroll(TILE == LARGE_TILE ? 1 : TILE)
    for (int k = 0; k < TILE; ++k) {
      float row[TILE];
      float column[TILE];
      exchange.panel.fetch(k, row_place, row);
      exchange.scaled.fetch(k, column_place, column);
#pragma unroll
      for (int r = 0; r < TILE; ++r) {
#pragma unroll
        for (int c = 0; c < TILE; ++c) x[r][c] -= row[r] * column[c];
      }
    }
  }

  // The tile's share of tr(X G), X symmetric, G a unit's block of which only the lower triangle is there.
  __device__ float trace_with(const float* block, int64_t row_stride, int width, int first_row, int first_column) const {
    float trace = 0.0f;
#pragma unroll
    for (int r = 0; r < TILE; ++r) {
      const int row = first_row + r;
#pragma unroll
      for (int c = 0; c < TILE; ++c) {
        const int column = first_column + c;
        if (row < width && column <= row) {
          const float product = x[r][c] * block[row * row_stride + column];
          trace += row == column ? product : 2.0f * product;
        }
      }
      // A row at a time: the whole tile of G has no room in registers beside X.
      asm volatile("" ::: "memory");
    }
    return trace;
  }
};

// Which tile of a lower triangle, row by row, a thread holds. sqrtf is exact where a row begins: 8 t + 1 = (2 r + 1)^2.
__device__ int tile_row_of(int thread) { return static_cast<int>((sqrtf(8.0f * thread + 1.0f) - 1.0f) * 0.5f); }

// The sum over all threads of a block, in thread 0; always in the same order.
__device__ double block_sum(double x) {
  __shared__ double warp_sums[MAX_THREADS / WARP];
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = x;
  __syncthreads();
  if (threadIdx.x != 0) return 0.0;
  double sum = 0.0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) sum += warp_sums[warp];
  return sum;
}

// One unit a block of threads. With A_KK = U D U^T, W = A_RK U^-T in the rows R and W = -U^-T in the rows K, a step of
// the sweep sets A_RK and A_KK to zero and subtracts W D^-1 W^T from the whole matrix. It has two barriers: a row of W to
// a thread, then a tile to a thread, with what the next step begins with. `DIAGONAL`: only the pivots are wanted, for
// which the columns swept before do not count any more.
template <int TILE, bool DIAGONAL>
__global__ void __launch_bounds__(MAX_THREADS) unit_errors(DiagonalBlocks blocks, int tile_rows, float* errors) {
  __shared__ Exchange<TILE> exchange;
  const int thread = threadIdx.x;
  const int row = tile_row_of(thread);
  const int column = thread - row * (row + 1) / 2;
  const bool holds_tile = row < tile_rows;
  const int width = static_cast<int>(blocks.width);
  const int64_t first = blockIdx.x * blocks.width;

  Tile<TILE> a;
  a.load(blocks.a + first * (blocks.a_row_stride + 1), blocks.a_row_stride, width, row * TILE, column * TILE);
  for (int swept = -1; swept < tile_rows; ++swept) {
    if (swept >= 0) {
      // There are at least as many threads as rows.
      const int place = thread / TILE;
      if (place < tile_rows && (!DIAGONAL || place > swept)) exchange.eliminate(swept, thread);
      __syncthreads();
      if (holds_tile && (!DIAGONAL || column > swept)) {
        if (row == swept || column == swept) a.clear();
        a.subtract(exchange, row, column);
      }
    }
    const int next = swept + 1;
    if (holds_tile && row == next && column == next) {
      a.factor(exchange, next);
    } else if (holds_tile && (column == next || (!DIAGONAL && row == next))) {
      float* const rows = column == next ? exchange.after[row * TILE] : exchange.before[0] + column * TILE;
      a.store(rows, column == next ? Exchange<TILE>::AFTER_STRIDE : Exchange<TILE>::BEFORE_STRIDE);
    }
    __syncthreads();
  }

  const float* g = blocks.g + first * (blocks.g_row_stride + 1);
  float error = 0.0f;
  if constexpr (DIAGONAL) {
    for (int j = thread; j < width; j += blockDim.x) {
      error += g[j * (blocks.g_row_stride + 1)] * exchange.inverse[j / TILE][j % TILE];
    }
  } else if (holds_tile) {
    error = -a.trace_with(g, blocks.g_row_stride, width, row * TILE, column * TILE);
  }
  const double sum = block_sum(error);
  if (thread == 0) errors[blockIdx.x] = static_cast<float>(sum);
}

template <int TILE>
void launch(const DiagonalBlocks& blocks, bool diagonal, float* errors, cudaStream_t stream) {
  const int tile_rows = static_cast<int>((blocks.width + TILE - 1) / TILE);
  const int threads = (tile_rows * (tile_rows + 1) / 2 + WARP - 1) / WARP * WARP;
  const auto kernel = diagonal ? unit_errors<TILE, true> : unit_errors<TILE, false>;
  kernel<<<static_cast<unsigned>(blocks.units), threads, 0, stream>>>(blocks, tile_rows, errors);
}

}  // namespace

void grouped_cholesky_errors_cuda(const DiagonalBlocks& blocks, bool diagonal, float* errors, CUstream_st* stream) {
  if (blocks.units == 0) return;
  if (blocks.width <= SMALL_TILE * MAX_TILE_ROWS) {
    launch<SMALL_TILE>(blocks, diagonal, errors, stream);
  } else {
    launch<LARGE_TILE>(blocks, diagonal, errors, stream);
  }
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("grouped Cholesky: ") + cudaGetErrorString(status));
  }
}

}  // namespace pyprune
