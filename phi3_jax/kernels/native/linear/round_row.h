// Rounding a row of x to bf16 where no instruction does so; the result stays float32, because that is multiplied.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bf16.h"

namespace phi3 {

// Words: a vector of uint32_t.
template <class Words>
inline void round_row_as_floats(const float* x, int64_t k, float* out) {
  constexpr int64_t kLanes = sizeof(Words) / 4;
  const int64_t even = k + k % 2;
  for (int64_t i = 0; i < even; i += kLanes) {
    Words bits = {};
    std::memcpy(&bits, x + i, 4 * std::min(kLanes, k - i));
    bits = round_to_bf16(bits);
    std::memcpy(out + i, &bits, 4 * std::min(kLanes, even - i));
  }
}

}  // namespace phi3
