// The core's CPU operators from plain C++: moments of bfloat16 rows, and errors of units of channels.
// Build and run, in this folder:  make run-moments
// `make -n run-moments` prints the commands: ../cpu/NAME.cpp of each operator, ../cpu/isa/NAME.cpp once for each
// instruction set with -DPYPRUNE_ISA=portable, avx2 and avx512, and ../cpu/isa.cpp. Exit status 1: a result is wrong.

#include "pyprune/channel_moments.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "pyprune/grouped_cholesky.h"

namespace {

constexpr double UNIT = 0x1p-24;  // of float32's rounding
constexpr int THREADS = 2;

uint16_t to_bfloat16(float x) { return static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + 0x8000) >> 16); }
double from_bfloat16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

bool within(const char* name, int64_t place, double found, double exact, double bound) {
  if (std::abs(found - exact) <= bound) return true;  // false for NaN
  std::printf("%s[%lld] is %.9g, exactly %.9g, +- %.1e\n", name, static_cast<long long>(place), found, exact, bound);
  return false;
}

// Two updates of one state, as rows arrive; every mean and centred sum of squares against float64.
bool moments_are_right() {
  constexpr int64_t rows = 3000, first_part = 1100, channels = 331, stride = 352;
  std::mt19937 generator(0);
  std::normal_distribution<float> normal(3.0f, 1.0f);
  std::vector<uint16_t> x(rows * stride);
  for (uint16_t& value : x) value = to_bfloat16(normal(generator));

  std::vector<float> mean(channels), m2(channels);
  pyprune::channel_moments_cpu({x.data(), pyprune::DType::bfloat16, first_part, channels, stride},
                               {0, mean.data(), m2.data()}, THREADS);
  pyprune::channel_moments_cpu(
      {x.data() + first_part * stride, pyprune::DType::bfloat16, rows - first_part, channels, stride},
      {first_part, mean.data(), m2.data()}, THREADS);

  bool right = true;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, exact_m2 = 0;
    for (int64_t r = 0; r < rows; ++r) sum += from_bfloat16(x[r * stride + c]);
    const double exact_mean = sum / rows;
    for (int64_t r = 0; r < rows; ++r) exact_m2 += std::pow(from_bfloat16(x[r * stride + c]) - exact_mean, 2);
    // Tiles of 8 rows are merged one after another, each time with a rounding: of K roundings of either sign sqrt(K)
    // remain (Higham and Mary 2019). A tile's mean is rounded relative to x, not to its deviations. 4: the constants.
    const double merges = std::sqrt(rows / 8.0), squares = exact_m2 + rows * exact_mean * exact_mean;
    right &= within("mean", c, mean[c], exact_mean, 4 * UNIT * merges * std::sqrt(squares / rows));
    right &= within("m2", c, m2[c], exact_m2, 4 * UNIT * (merges * exact_m2 + std::sqrt(exact_m2 * squares)));
  }
  return right;
}

// A = RHO^|i - j|, whose inverse and pivots are known: A^-1 is tridiagonal, L_jj^2 is 1, then 1 - RHO^2.
bool errors_are_right(bool diagonal) {
  constexpr int64_t units = 6, width = 48, channels = units * width;
  constexpr double RHO = 0.5, PIVOT = 1 - RHO * RHO;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> w(width * channels), a(channels * channels, nan), g(channels * channels, nan);
  for (float& value : w) value = normal(generator);
  // Only the lower triangles of the diagonal blocks are read: the rest stays NaN.
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = i / width * width; j <= i; ++j) {
      double product = 0;
      for (int64_t k = 0; k < width; ++k) product += static_cast<double>(w[k * channels + i]) * w[k * channels + j];
      g[i * channels + j] = static_cast<float>(product);
      a[i * channels + j] = static_cast<float>(std::pow(RHO, i - j));
    }
  }
  std::vector<float> errors(units);
  pyprune::grouped_cholesky_errors_cpu({a.data(), channels, g.data(), channels, units, width}, diagonal, errors.data(),
                                       THREADS);
  bool right = true;
  for (int64_t u = 0; u < units; ++u) {
    double exact = 0, trace = 0;
    for (int64_t i = u * width; i < (u + 1) * width; ++i) {
      const bool first = i == u * width, last = i + 1 == (u + 1) * width;
      const double square = g[i * channels + i];
      trace += square;
      if (diagonal) {
        exact += first ? square : square / PIVOT;
      } else {
        exact += (first || last ? 1 : 1 + RHO * RHO) / PIVOT * square;
        if (!first) exact -= 2 * RHO / PIVOT * g[i * channels + i - 1];
      }
    }
    // An inverse is off by at most 10 n u cond(A) |A^-1| (Higham 2002, chapter 14), here cond(A) < 9 and |A^-1| < 3.
    right &= within("error", u, errors[u], exact, 10 * width * UNIT * 9 * 3 * trace);
  }
  return right;
}

}  // namespace

int main() {
  const bool right = moments_are_right() & errors_are_right(false) & errors_are_right(true);
  std::puts(right ? "moments and errors of units are those of float64" : "wrong");
  return right ? 0 : 1;
}
