#pragma once

// What every binding checks before raw addresses reach a kernel. A failed check is Python's ValueError.

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "pyprune/channel_moments.h"

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

}  // namespace pyprune
