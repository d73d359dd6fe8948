#pragma once

#include <cstdint>

struct CUstream_st;

namespace pyprune {

// Diagonal blocks of a and g, [units * width, units * width]: unit u is rows and columns u * width ... (u + 1) * width,
// row r of a starts a_row_stride elements after row r - 1. Only the lower triangles of the blocks are read.
struct DiagonalBlocks {
  const float* a;
  int64_t a_row_stride;
  const float* g;
  int64_t g_row_stride;
  int64_t units;
  int64_t width;
};

// The kernel on CUDA holds a block's triangle in the registers of one multiprocessor.
constexpr int64_t GROUPED_CHOLESKY_CUDA_WIDTH = 256;

// Both functions write one error a unit, [units]: tr(A^-1 G), or with `diagonal` sum_j G_jj / L_jj^2 where A = L L^T;
// NaN where the block of a is not positive definite. Both sweep A = U D U^T out in blocks of columns K (Beaton 1964),
//
//   A_KK to -A_KK^-1,  A_RK to A_RK A_KK^-1,  A_RR to A_RR - A_RK A_KK^-1 A_KR,  R all other columns, swept or not,
//
// which takes no more operations than a factorisation and an inverse of the factor, but leaves no short loops: a step
// changes the whole triangle at once. The pivots D are the squares L_jj^2. Results repeat bit for bit; on the CPU they
// do not depend on `threads`.
void grouped_cholesky_errors_cpu(const DiagonalBlocks& blocks, bool diagonal, float* errors, int threads);

// Asynchronous on `stream` of the current device; width is at most GROUPED_CHOLESKY_CUDA_WIDTH. Throws
// std::runtime_error with CUDA's text.
void grouped_cholesky_errors_cuda(const DiagonalBlocks& blocks, bool diagonal, float* errors, CUstream_st* stream);

}  // namespace pyprune
