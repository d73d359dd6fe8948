#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyprune {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  // Each set asks for exactly the flags that setup.py compiles csrc/cpu/isa/ with.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx512) return avx2 && __builtin_cpu_supports("avx512f");
  if (isa == Isa::avx2) return avx2;
#endif
  return isa == Isa::portable;
}

}  // namespace

Isa choose_isa() {
  const char* wanted = std::getenv("PYPRUNE_CPU_ISA");
  for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (supported(isa) && (wanted == nullptr || std::string(wanted) == isa_name(isa))) return isa;
  }
  throw std::invalid_argument("PYPRUNE_CPU_ISA=" + std::string(wanted) +
                              " cannot run on this processor; unset it or use portable, avx2 or avx512");
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::portable: break;
  }
  return "portable";
}

}  // namespace pyprune
