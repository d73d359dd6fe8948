#pragma once

namespace pyprune {

enum class Isa { portable, avx2, avx512 };

// The widest instruction set that this build carries and this processor and its system support.
Isa detect_isa();

const char* isa_name(Isa isa);

}  // namespace pyprune
