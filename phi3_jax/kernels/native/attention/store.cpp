// Writing one token's keys or values to a row of the cache.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "attention/vectors.h"
#include "bf16.h"

namespace phi3 {
namespace {

inline U to_bf16(V x) { return round_to_bf16(as_bits(x)) >> 16; }

// Writes n values, given as vectors of 32-bit integers, as type T, and zeros up to row_length.
template <class T, class F>
inline void store_as(const float* x, int64_t n, int64_t row_length, T* row, const F& f) {
  typedef T Narrow __attribute__((vector_size(sizeof(T) * kLanes)));
  each_vector(x, n, [&](int64_t i, V values) {
    const Narrow narrow = __builtin_convertvector(f(values), Narrow);
    if (n - i >= kLanes)
      std::memcpy(row + i, &narrow, sizeof narrow);
    else
      std::memcpy(row + i, &narrow, (n - i) * sizeof(T));
  });
  std::fill(row + n, row + row_length, T{});
}

}  // namespace

void store_row(CacheType type, const float* x, int64_t head_dim, int64_t row_length, void* row, float* scale) {
  if (type == CacheType::kFloat32) return store_as(x, head_dim, row_length, static_cast<uint32_t*>(row), as_bits);
  if (type == CacheType::kBfloat16) return store_as(x, head_dim, row_length, static_cast<uint16_t*>(row), to_bf16);
  V most = V{}, zero_or_nan = V{};
  each_vector(x, head_dim, [&](int64_t, V v) {
    most = maximum(most, maximum(v, -v));
    zero_or_nan = zero_or_nan + (v - v);
  });
  // NaN for a NaN or infinity: then the token's scores and values are NaN too.
  *scale = lanes_max(most) / 127 + lanes_sum(zero_or_nan);
  const bool usable = *scale > 0;
  const V divisor = splat(usable ? *scale : 1.f), limit = splat(usable ? 127.f : 0.f);
  store_as(x, head_dim, row_length, static_cast<uint8_t*>(row), [&](V v) {
    const V clipped = -maximum(-maximum(v / divisor, -limit), -limit);
    return as_bits(clipped + splat(12582912.f));  // 1.5 * 2^23: the last byte is the nearest integer
  });
}

}  // namespace phi3
