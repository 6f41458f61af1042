// Which instruction set runs. Every kernel exists once for each of them, compiled with its own flags from files that end
// in _avx512.cpp, _avx2.cpp, _neon.cpp or _portable.cpp; nothing else may be compiled with such flags.
#pragma once
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace phi3 {

enum class Isa { kPortable, kNeon, kAvx2, kAvx512 };

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kNeon: return "neon";
    default: return "portable";
  }
}

inline bool supported(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Half-precision conversions (F16C), which clang cannot ask about, came before AVX2.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) return true;
#endif
  return false;
}

// The best instruction set of this processor, or the one that the environment names, read once.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("PHI3_JAX_ISA");
    for (Isa each : {Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kPortable})
      if (supported(each) && (!wanted || !*wanted || !std::strcmp(wanted, name(each)))) return each;
    return Isa::kPortable;
  }();
  return chosen;
}

}  // namespace phi3
