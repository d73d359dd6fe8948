#pragma once

#include <cstddef>
#include <cstdint>

#include "pyprune/rows.h"

struct CUstream_st;

namespace pyprune {

// float32 sums over all rows seen so far. Element (i, j) of the Hessian, i >= j, is the sum of x[i] x[j] and lies at
// lower[i * stride + j]; above the diagonal only elements of the 64 x 64 blocks on it are ever written.
struct HessianState {
  float* lower;  // [channels, channels], aligned to 16 bytes
  int64_t stride;  // a multiple of 4
  float* sums;  // [channels], the sum of x[i]; may be null
};

// Weights of rows, in device memory; without them every row weighs 1. One factor of a product is an element times its
// row's weight, rounded to the element's type: powers of two round nothing. float16, whose exponents are few, takes
// weights of at most 1, and `factor`, which all sums are multiplied by.
struct HessianWeights {
  const float* weights = nullptr;  // [rows, rounded up to 64], 0 beyond the rows, aligned to 16 bytes
  const float* factor = nullptr;  // one number; null: 1
};
constexpr int64_t HESSIAN_WEIGHTS_MULTIPLE = 64;

// Bytes of device memory, aligned to 16, that one update needs.
size_t hessian_update_cuda_workspace(int64_t rows, int64_t channels, int multiprocessors);

// Tensor cores truncate as they sum: so many rows at most, then their sums are added to the state.
constexpr int64_t HESSIAN_CHUNK_ROWS = 3072;

// Adds the rows to the state, asynchronously on `stream` of the current device, which must be of compute capability
// 9.0. Rows are bfloat16 or float16, every one of them on 16 bytes, channels a multiple of 8. No rows, no change.
// Products are exact; the order of sums depends on the sizes and `multiprocessors` alone, so results repeat bit for
// bit. Throws std::runtime_error with CUDA's text.
void hessian_update_cuda(const Rows& x, const HessianState& hessian, void* workspace, int multiprocessors,
                         CUstream_st* stream, const HessianWeights& weights = {});

}  // namespace pyprune
