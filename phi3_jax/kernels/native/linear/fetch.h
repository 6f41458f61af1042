// Fetching weights into the caches before they are needed. Always inlined, because GCC 12 deletes calls of a function
// that only prefetches.
#pragma once
#include <cstdint>

namespace phi3 {

// How far ahead weights are fetched that only one pass reads. This, and into which cache, was found by trying.
constexpr int64_t fetch_distance(int bits) { return bits == 4 ? 4096 : 2048; }

// Prefetches never fault, so they may go beyond the weights. Addresses are integers, because C++ does not allow
// pointers outside of an array.
inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
__attribute__((always_inline)) inline void fetch_now(uintptr_t at) {
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
}
__attribute__((always_inline)) inline void fetch_soon(uintptr_t at) {
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
}

// One step of 128 bytes of weights. The only pass over them fetches what it needs itself a little later; a pass over a
// chunk that others pass too fetches half of the next chunk. The
// fetches are spread over the steps, because many at once wait for one another.
template <int kBits, bool kOnlyPass>
__attribute__((always_inline)) inline void fetch_step(uintptr_t ahead, int64_t step) {
  for (int i = 0; i < (kOnlyPass ? 128 : 64); i += 64) {
    if (kOnlyPass && kBits == 4)
      fetch_now(ahead + 128 * step + i);
    else
      fetch_soon(ahead + (kOnlyPass ? 128 : 64) * step + i);
  }
}

}  // namespace phi3
