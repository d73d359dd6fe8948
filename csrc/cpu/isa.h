#pragma once

namespace pyprune {

enum class Isa { portable, avx2, avx512 };

// The widest instruction set that this build carries and this processor and its system support, or the one
// that the environment's PYPRUNE_CPU_ISA names; std::invalid_argument where that one cannot run here.
Isa choose_isa();

const char* isa_name(Isa isa);

}  // namespace pyprune
