#include "lora/lora.h"

#include <algorithm>
#include <cstring>

#include "attention/vectors.h"
#include "dot.h"

namespace phi3 {
namespace {

constexpr int64_t kTogether = 8;  // ranks that are added in one pass over y

// y += factors[0] * rows[0] + factors[1] * rows[1] + ..., in this order.
void add_rows(const float* const* rows, const float* factors, int64_t count, int64_t O, float* y) {
  for (int64_t o = 0; o < O; o += kLanes) {
    const int64_t n = O - o;
    V sum = n < kLanes ? load_first(y + o, n) : load(y + o);
    for (int64_t r = 0; r < count; ++r)
      sum = fma(splat(factors[r]), n < kLanes ? load_first(rows[r] + o, n) : load(rows[r] + o), sum);
    std::memcpy(y + o, &sum, std::min<int64_t>(n, kLanes) * sizeof(float));
  }
}

}  // namespace

void add_update(const float* x, const float* a, const float* b, const float* scaling, int64_t I, int64_t O, int64_t R,
                float* y) {
  const float* rows[kTogether];
  float factors[kTogether];
  int64_t count = 0;
  for (int64_t r = 0; r < R; ++r) {
    if (scaling[r] == 0) continue;
    rows[count] = b + r * O;
    factors[count++] = scaling[r] * dot(x, a + r * I, I);
    if (count < kTogether) continue;
    add_rows(rows, factors, count, O, y);
    count = 0;
  }
  if (count) add_rows(rows, factors, count, O, y);
}

}  // namespace phi3
