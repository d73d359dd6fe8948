#include "pyprune/eliminate.h"

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <latch>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include "eliminate_tile.h"
#include "isa.h"

namespace pyprune {
namespace {

// A pivot's work on so many tiles takes some ten times as long as the threads' meeting for it.
constexpr int64_t MIN_TILES_PER_THREAD = 64;

// Rank and channel of a candidate in one word, smaller is better: errors are not negative, so that their bits ascend
// with them, and NaN's lie above infinity's.
using Key = uint64_t;
constexpr Key NO_KEY = ~Key{0};

Key make_key(float error, int64_t channel) {
  const uint32_t rank = std::bit_cast<uint32_t>(error) & 0x7fffffffu;
  return Key{rank} << 32 | static_cast<Key>(channel);
}

int64_t channel_of(Key key) { return static_cast<int64_t>(key & 0xffffffffu); }

SubtractPanel choose_kernel() {
#if defined(__x86_64__)
  switch (choose_isa()) {
    case Isa::avx512: return avx512::subtract_panel;
    case Isa::avx2: return avx2::subtract_panel;
    case Isa::portable: break;
  }
#endif
  return portable::subtract_panel;
}

// What the members of the team share: each owns a range of tiles, and a row of scratch.
class PanelRun {
 public:
  PanelRun(const Elimination& elimination, const EliminationPanel& panel, int members)
      : e_(elimination),
        panel_(panel),
        tiles_((elimination.channels + TILE_ROWS - 1) / TILE_ROWS),
        kernel_(choose_kernel()),
        lower_(tiles_ * panel.pivots * TILE_ROWS),
        u_(lower_.size()),
        scratch_(int64_t{4} * members * panel.pivots),
        best_(2 * members) {}

  // How many of the members came.
  void set_team(int members) {
    members_ = members;
    meeting_.emplace(members);
  }

  void run(int member) {
    const int64_t begin = tiles_ * member / members_;
    const int64_t end = tiles_ * (member + 1) / members_;
    float* scratch = scratch_.data() + int64_t{4} * member * panel_.pivots;
    Key best = NO_KEY;
    for (int64_t tile = begin; tile < end; ++tile) best = std::min(best, best_of(tile));
    for (int k = 0; k < panel_.pivots; ++k) {
      // Said at k, read by all before anyone says something at k + 2.
      Key* candidates = best_.data() + k % 2 * members_;
      candidates[member] = best;
      meeting_->arrive_and_wait();
      const int64_t pivot = channel_of(*std::min_element(candidates, candidates + members_));
      best = remove(pivot, k, begin, end, scratch);
    }
    for (int64_t tile = begin; tile < end; ++tile) write(tile, scratch + 3 * panel_.pivots);
  }

 private:
  int rows_of(int64_t tile) const {
    return static_cast<int>(std::min<int64_t>(TILE_ROWS, e_.channels - tile * TILE_ROWS));
  }

  // Where the panel's column t of a tile starts.
  int64_t offset(int64_t tile, int t) const { return (tile * panel_.pivots + t) * TILE_ROWS; }

  Key best_of(int64_t tile) const {
    Key best = NO_KEY;
    const int64_t first = tile * TILE_ROWS;
    for (int64_t i = first; i < first + rows_of(tile); ++i) {
      if (!e_.removed[i]) best = std::min(best, make_key(e_.g_diagonal[i] / e_.a_diagonal[i], i));
    }
    return best;
  }

  // Removes the pivot from the rows of some tiles; the best candidate that they then have.
  Key remove(int64_t pivot, int k, int64_t begin, int64_t end, float* scratch) {
    float* l_p = scratch;
    float* r_p = l_p + panel_.pivots;
    float* u_p = r_p + panel_.pivots;
    float* scales = u_p + panel_.pivots;
    for (int t = 0; t < k; ++t) {
      const int64_t entry = offset(pivot / TILE_ROWS, t) + pivot % TILE_ROWS;
      l_p[t] = lower_[entry];
      r_p[t] = l_p[t] * scales[t];
      u_p[t] = u_[entry] * scales[t];
    }
    // No member changes the pivot's diagonals.
    const float a_pivot = e_.a_diagonal[pivot];
    const float g_pivot = e_.g_diagonal[pivot];
    const float root = std::sqrt(a_pivot);
    scales[k] = 1.0f / root;
    Key best = NO_KEY;
    for (int64_t tile = begin; tile < end; ++tile) {
      update_tile(tile, pivot, k, {l_p, r_p, u_p}, scales[k], g_pivot);
      if (pivot / TILE_ROWS == tile) {
        e_.removed[pivot] = 1;
        e_.order[panel_.first + k] = pivot;
        e_.errors[panel_.first + k] = g_pivot / a_pivot;
        lower_[offset(tile, k) + pivot % TILE_ROWS] = root;
        u_[offset(tile, k) + pivot % TILE_ROWS] = 0.5f * g_pivot;
      }
      best = std::min(best, best_of(tile));
    }
    return best;
  }

  void update_tile(int64_t tile, int64_t pivot, int k, const PivotRow& row, float scale, float g_pivot) {
    float c[TILE_ROWS] = {};
    float q[TILE_ROWS] = {};
    const int64_t first = tile * TILE_ROWS;
    const int rows = rows_of(tile);
    for (int j = 0; j < rows; ++j) {
      const int64_t i = first + j;
      const int64_t entry = i < pivot ? pivot * e_.channels + i : i * e_.channels + pivot;
      c[j] = e_.a[entry];
      q[j] = e_.g[entry];
    }
    kernel_(lower_.data() + offset(tile, 0), u_.data() + offset(tile, 0), k, row, c, q);
    float* l_column = lower_.data() + offset(tile, k);
    float* u_column = u_.data() + offset(tile, k);
    for (int j = 0; j < rows; ++j) {
      const int64_t i = first + j;
      if (e_.removed[i] || i == pivot) continue;  // the columns are 0 there
      const float l = c[j] * scale;
      const float r = l * scale;
      const float u = q[j] - 0.5f * g_pivot * r;
      l_column[j] = l;
      u_column[j] = u;
      // Comparisons that let NaN through.
      const float a_left = e_.a_diagonal[i] - l * l;
      e_.a_diagonal[i] = a_left < e_.floor[i] ? e_.floor[i] : a_left;
      const float g_left = e_.g_diagonal[i] - 2.0f * u * r;
      e_.g_diagonal[i] = g_left < 0.0f ? 0.0f : g_left;
    }
  }

  // The tile's rows of the panel to where the caller wants them.
  void write(int64_t tile, const float* scales) const {
    const int64_t first = tile * TILE_ROWS;
    for (int j = 0; j < rows_of(tile); ++j) {
      float* lower = panel_.lower + (first + j) * panel_.lower_stride;
      float* products = panel_.products + (first + j) * int64_t{2} * panel_.width;
      for (int t = 0; t < panel_.pivots; ++t) {
        lower[t] = lower_[offset(tile, t) + j];
        products[t] = u_[offset(tile, t) + j];
        products[panel_.width + t] = lower[t] * scales[t];
      }
    }
  }

  const Elimination e_;
  const EliminationPanel panel_;
  const int64_t tiles_;
  const SubtractPanel kernel_;
  std::vector<float> lower_, u_;
  std::vector<float> scratch_;
  std::vector<Key> best_;
  int members_ = 0;
  std::optional<std::barrier<>> meeting_;
};

}  // namespace

void eliminate_panel_cpu(const Elimination& elimination, const EliminationPanel& panel, int threads) {
  if (panel.pivots == 0) return;
  const int64_t useful = elimination.channels / (MIN_TILES_PER_THREAD * TILE_ROWS);
  const int wanted = static_cast<int>(std::clamp<int64_t>(useful, 1, threads));
  PanelRun panel_run(elimination, panel, wanted);
  std::latch start(1);
  std::vector<std::jthread> helpers;
  helpers.reserve(wanted - 1);
  try {
    for (int member = 1; member < wanted; ++member) {
      helpers.emplace_back([&, member] {
        start.wait();
        panel_run.run(member);
      });
    }
  } catch (const std::system_error&) {
    // Fewer threads than wanted do the same work; the helpers there are wait for their number.
  }
  panel_run.set_team(static_cast<int>(helpers.size()) + 1);
  start.count_down();
  panel_run.run(0);
}

}  // namespace pyprune
