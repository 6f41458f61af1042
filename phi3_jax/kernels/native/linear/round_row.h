// Rounding a row of x to bf16 where no instruction does so; the result stays float32, because that is multiplied.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace phi3 {

template <int kLanes>
inline void round_row_as_floats(const float* x, int64_t k, float* out) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  const int64_t even = k + k % 2;
  for (int64_t i = 0; i < even; i += kLanes) {
    Bits bits = {};
    std::memcpy(&bits, x + i, 4 * std::min<int64_t>(kLanes, k - i));
    const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    // The carry would turn some NaN into infinity or zero.
    const Bits is_nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
    bits = (nearest & ~is_nan) | (((bits | 0x400000u) & 0xffff0000u) & is_nan);
    std::memcpy(out + i, &bits, 4 * std::min<int64_t>(kLanes, even - i));
  }
}

}  // namespace phi3
