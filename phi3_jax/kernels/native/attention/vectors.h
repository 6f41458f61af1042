// The vectors of the instruction set that is compiled:
//   V (kLanes floats), I (as many int32_t, which comparisons give)
//   fma (a * b + c), maximum, dots (lane i is the sum of the lanes of a[i])
//   load (bfloat16, given as uint16_t, and int8_t; as floats)
//   bits (one bit for each lane of a comparison)
//   PHI3_HAS_MASKS, if it also has load_first, exponent and append of its own
// and what fits its registers:
//   kDots          dot products at once where lanes lie along the head
//   kSums          accumulators of the sums of values
//   kTileSums      accumulators of a tile of scores
//   kTileVectors   vectors of query rows in a tile of scores, at most
//   kValueVectors  vectors of a tile of sums of values, which has 4 query rows
// Below the choice is what reads the same for every instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(PHI3_PORTABLE)
#include "attention/vectors_portable.h"
#elif defined(__AVX512F__)
#include "attention/vectors_avx512.h"
#elif defined(__AVX2__)
#include "attention/vectors_avx2.h"
#elif defined(__aarch64__)
#include "attention/vectors_neon.h"
#else
#include "attention/vectors_portable.h"
#endif

namespace phi3 {

typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline U as_bits(V v) {
  U u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}
inline V splat(float x) { return x - V{}; }
inline I splat(int32_t x) { return x - I{}; }
inline I load_int(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if !defined(PHI3_HAS_MASKS)
// The first n < kLanes elements, then zeros; nothing is read behind them.
template <class C>
inline V load_first(const C* p, int64_t n) {
  C full[kLanes] = {};
  std::memcpy(full, p, n * sizeof(C));
  return load(full);
}

// p * 2^n for a whole n in [-160, 0], 0 where n < -126.
inline V exponent(V p, V n) {
  const V biased = n + (12582912.f + 127 - V{});  // 1.5 * 2^23: the sum's last bits are n + 127
  const U bits = as_bits(biased) << 23;
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return n < -126.f - V{} ? V{} : p * scale;
}

// Appends first + i for every set bit i; up to kLanes elements may be written.
inline int64_t append(int32_t* list, int32_t first, unsigned bits) {
  if (bits == (1u << kLanes) - 1) {
    for (int i = 0; i < kLanes; ++i) list[i] = first + i;
    return kLanes;
  }
  int64_t n = 0;
  for (; bits; bits &= bits - 1) list[n++] = first + __builtin_ctz(bits);
  return n;
}
#endif

// Calls f(offset, vector) for every vector of a row of n elements, the last one filled up with zeros.
template <class C, class F>
inline void each_vector(const C* row, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, load(row + i));
  if (i < n) f(i, load_first(row + i, n - i));
}

inline float lanes_sum(V v) {
  float a[kLanes];
  store(a, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
inline float lanes_max(V v) {
  float a[kLanes];
  store(a, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}

// 2^x for x <= 0, with a relative error below 2e-7; 0 below -126, NaN for NaN. The polynomial is the minimax one of 2^r
// on [-1/2, 1/2].
inline V exp2(V x) {
  x = maximum(splat(-160.f), x);                            // a NaN in x stays one
  const V n = (x + splat(12582912.f)) - splat(12582912.f);  // 1.5 * 2^23: rounds to the nearest integer
  const V r = x - n;
  V p = splat(1.5353362e-4f);
  p = fma(p, r, splat(1.33988739e-3f));
  p = fma(p, r, splat(9.61843692e-3f));
  p = fma(p, r, splat(5.55033237e-2f));
  p = fma(p, r, splat(2.40226477e-1f));
  p = fma(p, r, splat(6.93147182e-1f));
  p = fma(p, r, splat(1.f));
  return exponent(p, n);
}

// Always inlined, because GCC 12 deletes calls of a function that only prefetches.
__attribute__((always_inline)) inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

}  // namespace phi3
