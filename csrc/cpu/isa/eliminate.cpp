#include "../eliminate_tile.h"

#include "vector.h"

namespace pyprune::PYPRUNE_ISA {
namespace {

constexpr int VECTORS = TILE_ROWS / VECTOR_WIDTH;

void subtract(const float* lower, const float* u, int64_t pivots, const PivotRow& row, float* c, float* q) {
  Vector c_sum[VECTORS];
  Vector q_sum[VECTORS];
  std::memcpy(c_sum, c, sizeof(c_sum));
  std::memcpy(q_sum, q, sizeof(q_sum));
  for (int64_t t = 0; t < pivots; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const Vector l = load(lower + t * TILE_ROWS + v * VECTOR_WIDTH);
      c_sum[v] -= l * row.lower[t];
      q_sum[v] -= load(u + t * TILE_ROWS + v * VECTOR_WIDTH) * row.r[t];
      q_sum[v] -= l * row.u[t];
    }
  }
  std::memcpy(c, c_sum, sizeof(c_sum));
  std::memcpy(q, q_sum, sizeof(q_sum));
}

}  // namespace

extern const SubtractPanel subtract_panel;
const SubtractPanel subtract_panel = subtract;

}  // namespace pyprune::PYPRUNE_ISA
