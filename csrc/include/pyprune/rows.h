#pragma once

#include <cstdint>

namespace pyprune {

enum class DType { float32, bfloat16, float16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// [rows, channels]; row r starts row_stride elements after row r - 1, channels are contiguous.
struct Rows {
  const void* x;
  DType dtype;
  int64_t rows;
  int64_t channels;
  int64_t row_stride;
};

}  // namespace pyprune
