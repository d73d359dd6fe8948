#include "pyprune/grouped_cholesky.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>
#include <vector>

#include "grouped_cholesky_row.h"
#include "isa.h"

namespace pyprune {
namespace {

// Starting a thread costs about 20 us, in which one core does about this many operations.
constexpr int64_t MIN_OPERATIONS_PER_THREAD = 400'000;

SubtractRow choose_subtract_row() {
#if defined(__x86_64__)
  switch (choose_isa()) {
    case Isa::avx512: return avx512::subtract_row;
    case Isa::avx2: return avx2::subtract_row;
    case Isa::portable: break;
  }
#endif
  return portable::subtract_row;
}

// One unit after the other, in memory of its own.
class Sweep {
 public:
  Sweep(int64_t width, SubtractRow subtract_row)
      : width_(width),
        stride_((width + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE),
        subtract_row_(subtract_row),
        a_(width * stride_),
        panel_(SWEPT_COLUMNS * stride_),
        scaled_(SWEPT_COLUMNS * stride_),
        inverse_(stride_) {}

  float error(const float* a, int64_t a_row_stride, const float* g, int64_t g_row_stride, bool diagonal) {
    for (int64_t i = 0; i < width_; ++i) {
      std::copy_n(a + i * a_row_stride, i + 1, &a_[i * stride_]);
      // The padding, and what is above the diagonal, takes part without effect; stale bits there could be slow.
      std::fill(&a_[i * stride_] + i + 1, &a_[i * stride_] + stride_, 0.0f);
    }
    for (int64_t first = 0; first < width_; first += SWEPT_COLUMNS) {
      const int columns = static_cast<int>(std::min<int64_t>(SWEPT_COLUMNS, width_ - first));
      // For the pivots alone, the rows swept before do not count any more.
      const int64_t begin = diagonal ? first : 0;
      if (!factor(first, columns)) return std::numeric_limits<float>::quiet_NaN();
      eliminate(first, columns, begin);
      subtract(first, columns, begin);
    }
    double error = 0;
    for (int64_t i = 0; i < width_; ++i) {
      const float* g_row = g + i * g_row_stride;
      if (diagonal) {
        error += static_cast<double>(g_row[i]) * inverse_[i];
      } else {
        const float* row = &a_[i * stride_];
        for (int64_t j = 0; j < i; ++j) error -= 2.0 * row[j] * g_row[j];
        error -= static_cast<double>(row[i]) * g_row[i];
      }
    }
    return static_cast<float>(error);
  }

 private:
  // A_KK = U D U^T: U below the diagonal of A_KK itself, 1 / D in inverse_. Whether all pivots are positive.
  bool factor(int64_t first, int columns) {
    for (int k = 0; k < columns; ++k) {
      const float pivot = a_[(first + k) * stride_ + first + k];
      if (!(pivot > 0)) return false;
      inverse_[first + k] = 1 / pivot;
      float scaled[SWEPT_COLUMNS];
      for (int i = k + 1; i < columns; ++i) {
        float* row = &a_[(first + i) * stride_ + first];
        scaled[i] = row[k] * inverse_[first + k];
        for (int j = k + 1; j <= i; ++j) row[j] -= row[k] * scaled[j];
      }
      for (int i = k + 1; i < columns; ++i) a_[(first + i) * stride_ + first + k] = scaled[i];
    }
    return true;
  }

  // panel_ [columns, rows]: W = A_RK U^-T, and -U^-T in the rows K; scaled_: W D^-1. Clears A_RK and A_KK.
  void eliminate(int64_t first, int columns, int64_t begin) {
    float factors[SWEPT_COLUMNS][SWEPT_COLUMNS] = {};
    for (int k = 0; k < columns; ++k) {
      for (int j = 0; j < k; ++j) factors[k][j] = a_[(first + k) * stride_ + first + j];
    }
    for (int k = 0; k < SWEPT_COLUMNS; ++k) {
      float* panel = &panel_[k * stride_];
      float* scaled = &scaled_[k * stride_];
      std::fill_n(panel, stride_, 0.0f);
      std::fill_n(scaled, stride_, 0.0f);
      if (k >= columns) continue;
      float* own = &a_[(first + k) * stride_];
      std::copy(own + begin, own + first, panel + begin);
      panel[first + k] = -1;
      for (int64_t i = first + columns; i < width_; ++i) panel[i] = a_[i * stride_ + first + k];
      for (int j = 0; j < k; ++j) {
        for (int64_t i = begin; i < width_; ++i) panel[i] -= factors[k][j] * panel_[j * stride_ + i];
      }
      for (int64_t i = begin; i < width_; ++i) scaled[i] = panel[i] * inverse_[first + k];
      std::fill_n(own, first + columns, 0.0f);
    }
    for (int64_t i = first + columns; i < width_; ++i) std::fill_n(&a_[i * stride_ + first], columns, 0.0f);
  }

  // A - W D^-1 W^T
  void subtract(int64_t first, int columns, int64_t begin) {
    const int64_t first_row = begin > 0 ? first + columns : 0;
    for (int64_t i = first_row; i < width_; ++i) {
      float factors[SWEPT_COLUMNS];
      for (int k = 0; k < SWEPT_COLUMNS; ++k) factors[k] = panel_[k * stride_ + i];
      const int64_t from = begin / ROW_MULTIPLE * ROW_MULTIPLE;
      const int64_t to = (i + ROW_MULTIPLE) / ROW_MULTIPLE * ROW_MULTIPLE;
      subtract_row_(factors, &scaled_[from], stride_, to - from, &a_[i * stride_ + from]);
    }
  }

  int64_t width_, stride_;
  SubtractRow subtract_row_;
  std::vector<float> a_;  // [width, stride], the lower triangle
  std::vector<float> panel_, scaled_;
  std::vector<float> inverse_;
};

}  // namespace

void grouped_cholesky_errors_cpu(const DiagonalBlocks& blocks, bool diagonal, float* errors, int threads) {
  const SubtractRow subtract_row = choose_subtract_row();
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    Sweep sweep(blocks.width, subtract_row);
    for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < blocks.units;) {
      const int64_t first = u * blocks.width;
      errors[u] = sweep.error(blocks.a + first * (blocks.a_row_stride + 1), blocks.a_row_stride,
                              blocks.g + first * (blocks.g_row_stride + 1), blocks.g_row_stride, diagonal);
    }
  };
  const int64_t operations = blocks.units * blocks.width * blocks.width * blocks.width;
  const int64_t useful = std::min({blocks.units, operations / MIN_OPERATIONS_PER_THREAD + 1, int64_t{threads}});
  std::vector<std::jthread> helpers;
  for (int64_t t = 1; t < useful; ++t) helpers.emplace_back(work);
  work();
}

}  // namespace pyprune
