// AVX2 with FMA: 8 floats to a vector.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace phi3 {

typedef __m256 V;
constexpr int kLanes = 8;
constexpr int kDots = 8;
constexpr int kSums = 12;
constexpr int kTileVectors = 2;
constexpr int kTileSums = 8;
constexpr int kValueVectors = 3;

inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V maximum(V a, V b) { return _mm256_max_ps(a, b); }  // b if either is NaN

inline V load(const uint16_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline V load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Lane i is the sum of the lanes of a[i].
inline V dots(const V* a) {
  const V low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const V high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}

typedef int32_t I __attribute__((vector_size(32)));
inline unsigned bits(I mask) { return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)); }

}  // namespace phi3
