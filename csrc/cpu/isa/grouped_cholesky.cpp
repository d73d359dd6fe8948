#include "../grouped_cholesky_row.h"

#include "vector.h"

namespace pyprune::PYPRUNE_ISA {
namespace {

static_assert(ROW_MULTIPLE % VECTOR_WIDTH == 0);

void subtract(const float* factors, const float* panel, int64_t panel_stride, int64_t columns, float* row) {
  for (int64_t j = 0; j < columns; j += VECTOR_WIDTH) {
    Vector sum = load(row + j);
#pragma GCC unroll 8
    for (int k = 0; k < SWEPT_COLUMNS; ++k) sum -= load(panel + k * panel_stride + j) * factors[k];
    std::memcpy(row + j, &sum, sizeof(sum));
  }
}

}  // namespace

extern const SubtractRow subtract_row;
const SubtractRow subtract_row = subtract;

}  // namespace pyprune::PYPRUNE_ISA
