#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace pyprune {

// A greedy elimination of single channels after its first removals. a and g, [channels, channels], are read in their
// lower triangles and only there; they stay as they were when the panel began.
struct Elimination {
  int64_t channels;
  const float* a;
  const float* g;
  float* a_diagonal;  // [channels], after all removals so far, as is g_diagonal
  float* g_diagonal;
  const float* floor;  // [channels], positive: a_diagonal goes no lower
  uint8_t* removed;    // [channels], 1 where removed
  int64_t* order;      // [count], channels in order of removal
  float* errors;       // [count], g_diagonal / a_diagonal at the removal
};

// Removals first ... first + pivots - 1. Row i of `lower` starts lower_stride elements after row i - 1 and gets
// `pivots` elements; products is [channels, 2 * width], width >= pivots, and gets U from column 0 and R from `width`.
struct EliminationPanel {
  int64_t first;
  int pivots;
  float* lower;
  int64_t lower_stride;
  float* products;
  int width;
};

// Both functions remove panel.pivots channels, each time the one of the smallest error, the lowest of equal ones; NaN
// counts as larger than any error. pyprune.ops.eliminate has the formulas. One channel must be left at least. Results
// repeat bit for bit; on the CPU they do not depend on `threads`, with CUDA they may on `multiprocessors`.
void eliminate_panel_cpu(const Elimination& elimination, const EliminationPanel& panel, int threads);

// How a panel of an elimination runs on the current device, on at most `multiprocessors` of its multiprocessors.
struct EliminationPlan {
  int panel;         // the largest `width` of a panel
  int blocks;        // all resident at once
  size_t workspace;  // bytes of device memory, aligned to 16, 0 before the first panel and kept from one to the next
};

// Throws std::runtime_error where the channels do not fit into the shared memory of so many multiprocessors.
EliminationPlan eliminate_cuda_plan(int64_t channels, int multiprocessors);

// Asynchronous on `stream` of the current device. All panels of one elimination run with the same `multiprocessors` and
// workspace, in order. Throws std::runtime_error with CUDA's text.
void eliminate_panel_cuda(const Elimination& elimination, const EliminationPanel& panel, int multiprocessors,
                          void* workspace, CUstream_st* stream);

}  // namespace pyprune
