// Asked before the kernels are compiled, and a library of its own for that.
#include "isa.h"

#define PHI3_EXPORT extern "C" __attribute__((visibility("default")))

PHI3_EXPORT const char* phi3_best_isa() { return phi3::best_isa(); }
PHI3_EXPORT int phi3_supports_isa(const char* isa) { return phi3::supported(isa); }
