#pragma once

#include <cstdint>

namespace pyprune {

// A multiple of every vector width; mean and M2 of a block (8 KiB) stay in the first-level cache.
constexpr int COLUMN_BLOCK = 1024;

// Moments of [rows, columns], columns <= COLUMN_BLOCK. Writes mean and m2 up to the next vector boundary.
// roots: square roots of the rows' weights, [rows]; null where every row weighs 1.
using BlockMoments = void (*)(const void* x, const float* roots, int64_t rows, int64_t row_stride, int columns,
                              float* mean, float* m2);

struct BlockMomentsTable {
  BlockMoments float32, bfloat16, float16;
};

namespace portable {
extern const BlockMomentsTable block_moments;
}
#if defined(__x86_64__)
namespace avx2 {
extern const BlockMomentsTable block_moments;
}
namespace avx512 {
extern const BlockMomentsTable block_moments;
}
#endif

}  // namespace pyprune
