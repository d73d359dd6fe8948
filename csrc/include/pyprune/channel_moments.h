#pragma once

#include <cstddef>
#include <cstdint>

#include "pyprune/rows.h"

struct CUstream_st;

namespace pyprune {

// Mean and centred sum of squares of the `count` rows seen so far, [channels] each.
// With count == 0 both are written without being read.
struct MomentsState {
  int64_t count;
  float* mean;
  float* m2;
};

// Square roots of the rows' weights, and the sum of the weights already in the state, which is not read where its
// count is 0. Without roots every row weighs 1. Mean and M2 are then sum(w^2 x) / sum(w^2) and sum(w^2 (x - mean)^2).
struct RowWeights {
  const float* roots = nullptr;  // [rows]
  const double* total = nullptr;
};

// Both functions add the rows to (mean, m2); the caller adds them to its count and its total. No rows, no change.
// The summation order depends on the sizes alone (and, with CUDA, on `multiprocessors`), so results
// repeat bit for bit whatever the timing; on the CPU they do not depend on `threads` either.
void channel_moments_cpu(const Rows& x, const MomentsState& state, int threads, const RowWeights& weights = {});

// Bytes of device memory, aligned to 16, that one update needs; 0 when a single launch suffices.
size_t channel_moments_cuda_workspace(DType dtype, int64_t rows, int64_t channels, int multiprocessors,
                                      bool weighted = false);

// Asynchronous on `stream` of the current device, where weights and total lie too. Throws std::runtime_error with
// CUDA's text.
void channel_moments_cuda(const Rows& x, const MomentsState& state, void* workspace, int multiprocessors,
                          CUstream_st* stream, const RowWeights& weights = {});

}  // namespace pyprune
