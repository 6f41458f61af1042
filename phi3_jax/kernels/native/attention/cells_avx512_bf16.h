// Cells of two bfloat16: half the multiplications of cells_float.h.
#pragma once
#include <cstdint>

#include "attention/vectors.h"

namespace phi3 {

struct Bf16Cells {
  typedef uint32_t Cell;
  typedef __m512i Vec;
  static constexpr int kStep = 2;

  static Vec vec(const Cell* p) { return _mm512_loadu_si512(p); }
  static Vec broadcast(const Cell* p) { return everywhere(static_cast<int>(*p)); }
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

}  // namespace phi3
