#include "norm/norm.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention/vectors.h"
#include "bf16.h"
#include "dot.h"

namespace phi3 {
namespace {

V rounded(V v) {
  const U bits = round_to_bf16(as_bits(v));
  V floats;
  std::memcpy(&floats, &bits, sizeof floats);
  return floats;
}

// The first n numbers of v.
void store_first(float* out, V v, int64_t n) { std::memcpy(out, &v, n * sizeof(float)); }
void store_first(uint16_t* out, V v, int64_t n) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
  const Narrow narrow = __builtin_convertvector(as_bits(v) >> 16, Narrow);
  std::memcpy(out, &narrow, n * sizeof(uint16_t));
}

}  // namespace

template <class Row, class Weight>
void rms_norm_row(const Row* x, const Weight* weight, int64_t D, float eps, Row* out) {
  constexpr bool kRounds = std::is_same_v<Row, uint16_t>;
  const V rate = splat(1.0f / std::sqrt(dot(x, x, D) / static_cast<float>(D) + eps));
  const auto normed = [&](V v, V w) {
    const V n = v * rate;
    return kRounds ? rounded(w * rounded(n)) : w * n;
  };
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) store_first(out + i, normed(load(x + i), load(weight + i)), kLanes);
  if (i < D) store_first(out + i, normed(load_first(x + i, D - i), load_first(weight + i, D - i)), D - i);
}

template void rms_norm_row(const float*, const float*, int64_t, float, float*);
template void rms_norm_row(const float*, const uint16_t*, int64_t, float, float*);
template void rms_norm_row(const uint16_t*, const float*, int64_t, float, uint16_t*);
template void rms_norm_row(const uint16_t*, const uint16_t*, int64_t, float, uint16_t*);

}  // namespace phi3
