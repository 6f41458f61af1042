// Attention on AVX-512: 16 floats to a vector. Compiled twice: where PHI3_BF16 is 1, products of many queries with a bf16
// or int8 cache are made in bf16 pairs.
#pragma GCC diagnostic push
#ifndef __clang__  // GCC 12 warns of its own header's deliberately undefined values
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention.h"

namespace {

typedef __m512 V;
constexpr int kLanes = 16;
constexpr int kDots = 16;         // dot products at once where lanes lie along the head
constexpr int kSums = 24;         // accumulators of the sums of values
constexpr int kTileSums = 16;     // accumulators of a tile of scores, which is
constexpr int kTileVectors = 4;   // at most as many vectors of query rows wide
constexpr int kValueVectors = 6;  // vectors of a tile of sums over values, which has 4 query rows

inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V maximum(V a, V b) { return _mm512_max_ps(a, b); }  // b if either is NaN
inline V exponent(V p, V n) { return _mm512_scalef_ps(p, n); }

inline V from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V from_int8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
inline V load(const uint16_t* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V load(const int8_t* p) { return from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

#define PHI3_MASKED_LOADS
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline V load_first(const uint16_t* p, int64_t n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline V load_first(const int8_t* p, int64_t n) { return from_int8(_mm_maskz_loadu_epi8(first(n), p)); }

// Lane i is the sum of the lanes of a[i]: a transposition of 16 x 16 that adds on its way.
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

#include "vectors.h"
#include "cells_float.h"

#if PHI3_BF16
// Two bfloat16 to a cell: half the multiplications.
struct Bf16Cells {
  typedef uint32_t Cell;
  typedef __m512i Vec;
  static constexpr int kStep = 2;

  static Vec vec(const Cell* p) { return _mm512_loadu_si512(p); }
  static Vec broadcast(const Cell* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static V multiply_add(Vec a, Vec b, V c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // 16 elements as bfloat16; what is one already is only moved.
  static __m256i round(V x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
  template <class C>
  static __m256i rounded(const C* p, int64_t n) {
    return round(n < kLanes ? load_first(p, n) : load(p));
  }
  static __m256i rounded(const uint16_t* p, int64_t n) {
    return n < kLanes ? _mm256_maskz_loadu_epi16(first(n), p) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }

  // Elements 2i and 2i + 1 to cell i; padded(n) elements are written.
  template <class C>
  static void pack_row(const C* row, int64_t n, Cell* cells) {
    for (int64_t i = 0; i < n; i += kLanes)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells + i / 2), rounded(row + i, n - i));
  }

  // Element i of both rows to cell i.
  template <class C>
  static void pack_values(const C* const* rows, int64_t n, Cell* cells) {
    for (int64_t i = 0; i < n; i += kLanes)
      interleave(rounded(rows[0] + i, n - i), rows[1] ? rounded(rows[1] + i, n - i) : __m256i{}, cells + i);
  }

  // Lane i of both vectors to cell i.
  static void pack(const V* x, Cell* cells) { interleave(round(x[0]), round(x[1]), cells); }

  static void interleave(__m256i low, __m256i high, Cell* cells) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    _mm512_storeu_si512(cells, _mm512_or_si512(_mm512_cvtepu16_epi32(low), shifted));
  }
};

template <>
struct CellsFor<uint16_t> {
  typedef Bf16Cells type;
};
template <>
struct CellsFor<int8_t> {  // an int8 is a bfloat16 without loss; its scale goes into factors and p
  typedef Bf16Cells type;
};
#endif

#include "attention_body.inc"

}  // namespace

namespace phi3 {
const AttentionKernels PHI3_TABLE = {PHI3_NAME, narrow, scratch_bytes, attend, finish, store_row};
}
