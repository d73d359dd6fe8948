#pragma once

#include <cstdint>

namespace pyprune {

// Rows that are updated together: their sums fill half the registers of the smallest vectors. A panel is kept as
// [tiles, pivots, TILE_ROWS], so that an update reads it from front to back.
constexpr int TILE_ROWS = 32;

// The pivot's row of the panel, [pivots] each: L_p, R_p = L_p scaled, U_p scaled (R_i U_p = L_i times it).
struct PivotRow {
  const float* lower;
  const float* r;
  const float* u;
};

// c −= Σ L L_p and q −= Σ (U R_p + R U_p) over the first `pivots` columns; lower, u:
// [pivots, TILE_ROWS]; c, q: [TILE_ROWS].
using SubtractPanel = void (*)(const float* lower, const float* u, int64_t pivots, const PivotRow& row, float* c,
                               float* q);

namespace portable {
extern const SubtractPanel subtract_panel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SubtractPanel subtract_panel;
}
namespace avx512 {
extern const SubtractPanel subtract_panel;
}
#endif

}  // namespace pyprune
