#pragma once

// What every binding checks before raw addresses reach a kernel. A failed check is Python's ValueError.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "pyprune/rows.h"

namespace pyprune {

// Memory that no allocation reaches: larger sizes are mistakes, and their products would overflow.
constexpr int64_t MAX_BYTES = int64_t{1} << 56;

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  refuse("dtype must be float32, bfloat16 or float16, not " + name);
}

inline void require_not_negative(const char* name, int64_t value) {
  if (value < 0) refuse(std::string(name) + " must not be negative, got " + std::to_string(value));
}

inline void require_positive(const char* name, int64_t value) {
  if (value <= 0) refuse(std::string(name) + " must be positive, got " + std::to_string(value));
}

inline void require_int32(const char* name, int64_t value) {
  if (value > INT32_MAX) refuse(std::string(name) + " must be below 2^31 on CUDA, got " + std::to_string(value));
}

inline void require_address(const char* name, uintptr_t address, int64_t alignment) {
  if (address == 0) refuse(std::string(name) + " is null");
  if (address % alignment != 0) {
    refuse(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
  }
}

inline void require_memory(const char* names, int64_t rows, int64_t row_elements, int64_t element_bytes) {
  if (rows > 0 && row_elements > MAX_BYTES / element_bytes / rows) {
    refuse(std::string(names) + " describe more memory than can exist");
  }
}

// Device memory as the *_workspace functions ask for it; where they ask for none the address may be anything.
inline void require_workspace(uintptr_t address, int64_t bytes, size_t needed) {
  if (bytes < static_cast<int64_t>(needed)) {
    refuse("the workspace has " + std::to_string(bytes) + " bytes and needs " + std::to_string(needed));
  }
  if (needed > 0) require_address("workspace_ptr", address, 16);
}

// `vector_bytes`: what the address must be a multiple of, beside the element's own size. No elements, any address.
inline Rows checked_rows(uintptr_t x, const std::string& dtype_name, int64_t rows, int64_t channels,
                         int64_t row_stride, int64_t vector_bytes = 1) {
  const DType dtype = parse_dtype(dtype_name);
  const int64_t size = element_size(dtype);
  require_not_negative("rows", rows);
  require_not_negative("channels", channels);
  require_not_negative("row_stride", row_stride);
  if (rows > 0 && channels > 0) {
    require_address("x_ptr", x, std::max(size, vector_bytes));
    require_memory("rows, channels and row_stride", rows, std::max(channels, row_stride), size);
  }
  return {reinterpret_cast<const void*>(x), dtype, rows, channels, row_stride};
}

}  // namespace pyprune
