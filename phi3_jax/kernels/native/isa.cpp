// Which instruction set the kernels are compiled for. A library of its own that is asked before, so it must run on
// every processor: it is compiled without the flags of an instruction set.
#include <cstring>

namespace {

constexpr const char* kInstructionSets[] = {"avx512_bf16", "avx512", "avx2", "neon", "portable"};  // the best first

// Whether this processor can run the kernels of an instruction set.
bool supported(const char* isa) {
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
const char* best_isa() {
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

}  // namespace

#define PHI3_EXPORT extern "C" __attribute__((visibility("default")))

PHI3_EXPORT const char* phi3_best_isa() { return best_isa(); }
PHI3_EXPORT int phi3_supports_isa(const char* isa) { return supported(isa); }
