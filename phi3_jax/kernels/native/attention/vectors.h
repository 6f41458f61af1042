// Small things on vectors that read the same for every instruction set. Included inside an anonymous namespace, behind
// the set's own: V (kLanes floats), fma, maximum, load(bf16*), load(int8*), dots, bits, append, exponent.

using phi3::AttentionTask;
using phi3::CacheType;
using phi3::kBlockRows;
using phi3::padded;

typedef int32_t I __attribute__((vector_size(4 * kLanes)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V splat(float x) { return x - V{}; }
inline I splat(int32_t x) { return x - I{}; }
inline I load_int(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#ifndef PHI3_MASKED_LOADS
// The first n < kLanes elements, then zeros; nothing is read behind them.
template <class C>
inline V load_first(const C* p, int64_t n) {
  C full[kLanes] = {};
  std::memcpy(full, p, n * sizeof(C));
  return load(full);
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
  x = maximum(splat(-160.f), x);                            // this order lets NaN through
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

inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}
