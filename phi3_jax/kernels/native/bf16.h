// Rounding to bfloat16.
#pragma once
#include <cstdint>

namespace phi3 {

// Rounds float32 numbers to the nearest bfloat16, ties to even: the upper half of each word; the lower half becomes 0,
// so the result is a float32, too. `Bits` is a vector (GCC's or clang's) of the numbers' bits as uint32_t.
template <class Bits>
inline Bits round_to_bf16(Bits bits) {
  const Bits nearest = bits + 0x7fff + ((bits >> 16) & 1);
  // A NaN only becomes a quiet one: adding to its bits could give infinity or zero.
  const Bits is_nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
  return ((nearest & ~is_nan) | ((bits | 0x400000u) & is_nan)) & 0xffff0000u;
}

}  // namespace phi3
