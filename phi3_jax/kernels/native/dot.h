// A dot product whose order depends on its length alone.
#pragma once
#include <cstdint>

#include "attention/vectors.h"

namespace phi3 {

// Of n numbers, float or (as uint16_t) bfloat16.
template <class A, class B>
inline float dot(const A* a, const B* b, int64_t n) {
  constexpr int kChains = 4;  // sums that do not wait for one another
  V sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) sums[c] = fma(load(a + i + c * kLanes), load(b + i + c * kLanes), sums[c]);
  for (; i + kLanes <= n; i += kLanes) sums[0] = fma(load(a + i), load(b + i), sums[0]);
  if (i < n) sums[1] = fma(load_first(a + i, n - i), load_first(b + i, n - i), sums[1]);
  return lanes_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace phi3
