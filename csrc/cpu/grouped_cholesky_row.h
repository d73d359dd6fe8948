#pragma once

#include <cstdint>

namespace pyprune {

// Columns that the sweep takes at a time.
constexpr int SWEPT_COLUMNS = 8;
// Rows are padded to whole vectors of any instruction set.
constexpr int ROW_MULTIPLE = 16;

// row[j] -= sum over k of factors[k] * panel[k * panel_stride + j], j < columns, a multiple of ROW_MULTIPLE.
using SubtractRow = void (*)(const float* factors, const float* panel, int64_t panel_stride, int64_t columns,
                             float* row);

namespace portable {
extern const SubtractRow subtract_row;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SubtractRow subtract_row;
}
namespace avx512 {
extern const SubtractRow subtract_row;
}
#endif

}  // namespace pyprune
