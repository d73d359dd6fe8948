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

// Both functions add the rows to (mean, m2); the caller adds them to its count. No rows, no change.
// The summation order depends on the sizes alone (and, with CUDA, on `multiprocessors`), so results
// repeat bit for bit whatever the timing; on the CPU they do not depend on `threads` either.
void channel_moments_cpu(const Rows& x, const MomentsState& state, int threads);

// Bytes of device memory, aligned to 16, that one update needs; 0 when a single launch suffices.
size_t channel_moments_cuda_workspace(DType dtype, int64_t rows, int64_t channels, int multiprocessors);

// Asynchronous on `stream` of the current device. Throws std::runtime_error with CUDA's text.
void channel_moments_cuda(const Rows& x, const MomentsState& state, void* workspace, int multiprocessors,
                          CUstream_st* stream);

}  // namespace pyprune
