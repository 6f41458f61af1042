// Which instruction sets there are. Every kernel exists once for each of them, compiled with its own flags from files
// that end in _avx2.cpp and so on; nothing else may be compiled with such flags. A library holds
// the kernels of one instruction set, which PHI3_CHOSEN names.
#pragma once
#include <cstring>

// PHI3_OF_CHOSEN(linear) is linear_avx2, for instance.
#define PHI3_JOIN(kind, isa) kind##_##isa
#define PHI3_EXPAND(kind, isa) PHI3_JOIN(kind, isa)
#define PHI3_OF_CHOSEN(kind) PHI3_EXPAND(kind, PHI3_CHOSEN)

namespace phi3 {

constexpr const char* kInstructionSets[] = {"avx512_bf16", "avx512", "avx2", "neon", "portable"};  // the best first

// Whether this processor can run the kernels of an instruction set.
inline bool supported(const char* isa) {
  const auto is = [isa](const char* other) { return !std::strcmp(isa, other); };
  if (is("portable")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Half-precision conversions (F16C), which clang cannot ask about, came before AVX2.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (is("avx2")) return avx2;
  if (is("avx512")) return avx512;
  if (is("avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (is("neon")) return true;
#endif
  return false;
}

// The fastest one here.
inline const char* best_isa() {
  for (const char* isa : kInstructionSets) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // A Xeon (Sapphire Rapids) takes four times as long for products of bf16 pairs as for those of floats.
    if (!std::strcmp(isa, "avx512_bf16") && __builtin_cpu_is("intel")) continue;
#endif
    if (supported(isa)) return isa;
  }
  return "portable";
}

}  // namespace phi3
