// Any processor: the compiler's own vectors of 4 floats.
#pragma once
#include <cstdint>
#include <cstring>

namespace phi3 {

typedef float V __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kDots = 8;
constexpr int kSums = 8;
constexpr int kTileVectors = 2;
constexpr int kTileSums = 8;
constexpr int kValueVectors = 2;

inline V fma(V a, V b, V c) { return a * b + c; }
inline V maximum(V a, V b) { return a > b ? a : b; }  // b if either is NaN

// p's elements as type T, which is wider.
template <class T, class C>
inline T widened(const C* p) {
  typedef C Narrow __attribute__((vector_size(kLanes * sizeof(C))));
  Narrow narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(narrow, T);
}

typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));

inline V load(const uint16_t* p) { return reinterpret_cast<V>(widened<U>(p) << 16); }
inline V load(const int8_t* p) { return __builtin_convertvector(widened<I>(p), V); }

// Lane i is the sum of the lanes of a[i].
inline V dots(const V* a) {
  return V{(a[0][0] + a[0][1]) + (a[0][2] + a[0][3]), (a[1][0] + a[1][1]) + (a[1][2] + a[1][3]),
           (a[2][0] + a[2][1]) + (a[2][2] + a[2][3]), (a[3][0] + a[3][1]) + (a[3][2] + a[3][3])};
}

inline unsigned bits(I mask) { return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8); }

}  // namespace phi3
