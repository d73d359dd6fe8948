#pragma once

// Included only by the files of this folder, which are compiled once per instruction set. Everything is
// in the namespace of that set: an inline function shared between the sets could be linked in its widest
// form and crash the others.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int VECTOR_WIDTH = VECTOR_BYTES / 4;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Bits widen(const void* halves) {
  HalfBits narrow;
  std::memcpy(&narrow, halves, sizeof(narrow));
  return __builtin_convertvector(narrow, Bits);
}

inline Vector load(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

inline Vector load(const BFloat16* x) { return bit_cast<Vector>(widen(x) << 16); }

inline Vector load(const Float16* x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  // Exponent and fraction in their fp32 places are the value times 2^-112, subnormals included.
  const Bits half = widen(x);
  const Vector magnitude = bit_cast<Vector>((half & 0x7fffu) << 13) * 0x1p112f;
  const Bits special = bit_cast<Bits>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bit_cast<Vector>(bit_cast<Bits>(magnitude) | special | ((half & 0x8000u) << 16));
#endif
}

}  // namespace pyprune::PYPRUNE_ISA
