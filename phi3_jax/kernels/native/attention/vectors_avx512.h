// AVX-512: 16 floats to a vector.
#pragma once
#include <cstdint>

#include "intrinsics_avx512.h"

namespace phi3 {

typedef __m512 V;
constexpr int kLanes = 16;
constexpr int kDots = 16;
constexpr int kSums = 24;
constexpr int kTileVectors = 4;
constexpr int kTileSums = 16;
constexpr int kValueVectors = 6;

inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V maximum(V a, V b) { return _mm512_max_ps(a, b); }  // b if either is NaN
inline V exponent(V p, V n) { return _mm512_scalef_ps(p, n); }

inline V from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V from_int8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
inline V load(const uint16_t* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V load(const int8_t* p) { return from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

#define PHI3_HAS_MASKS
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline V load_first(const uint16_t* p, int64_t n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline V load_first(const int8_t* p, int64_t n) { return from_int8(_mm_maskz_loadu_epi8(first(n), p)); }

// Lane i is the sum of the lanes of a[i]: the steps of a 16 x 16 transposition, each adding the halves.
inline V dots(const V* a) {
  V quarter[4];
  for (int i = 0; i < 4; ++i) {
    const V ab = _mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]) + _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]);
    const V cd = _mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]) + _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]);
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    quarter[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
  }
  V half[2];
  for (int i = 0; i < 2; ++i)
    half[i] = _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0x44) +
              _mm512_shuffle_f32x4(quarter[2 * i], quarter[2 * i + 1], 0xee);
  return _mm512_shuffle_f32x4(half[0], half[1], 0x88) + _mm512_shuffle_f32x4(half[0], half[1], 0xdd);
}

typedef int32_t I __attribute__((vector_size(64)));
inline unsigned bits(I mask) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)); }

// Appends first + i for every set bit i.
inline int64_t append(int32_t* list, int32_t first, unsigned bits) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i values = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
  _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), values));
  return __builtin_popcount(bits);
}

}  // namespace phi3
