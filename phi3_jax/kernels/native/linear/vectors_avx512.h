// AVX-512 with VNNI: all four products of a quad of integers are one instruction. With AVX512_BF16 both products of a
// pair of bf16 are one instruction, too; else bf16 is widened to float32.
#pragma once
#include <cstdint>

#include "intrinsics_avx512.h"
#include "linear/fetch.h"
#include "linear/round_row.h"
#include "linear/unroll.h"

namespace phi3 {

struct V {
  static constexpr int kLanes = 16;
  using Floats = __m512;
  using Ints = __m512i;
  typedef uint32_t Words __attribute__((vector_size(64)));

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static Floats set(float a) { return _mm512_set1_ps(a); }
  static Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats add_product(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(b, c, a); }
  static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Ints set_ints(int32_t a) { return _mm512_set1_epi32(a); }

#if defined(__AVX512BF16__)
  using Rounded = uint16_t;
  using Weights = __m512bh;
  using Inputs = __m512bh;
  static constexpr int kBf16Rows = 6;
  static constexpr int bf16_vectors(int64_t) { return 4; }
  static Weights weights(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void round_row(const float* x, int64_t k, uint16_t* out) {
    for (int64_t i = 0; i < k; i += 16) {
      const __mmask16 in = k - i < 16 ? (1u << (k - i)) - 1 : 0xffff;
      const int64_t even = k + k % 2 - i;
      const __mmask16 to = even < 16 ? (1u << even) - 1 : 0xffff;
      _mm256_mask_storeu_epi16(out + i, to, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(in, x + i)));
    }
  }
  static Inputs inputs(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (__m512bh)phi3::everywhere(pair);
  }
  static Floats dot2(Floats sum, Weights w, Inputs x) { return _mm512_dpbf16_ps(sum, x, w); }
#else
  using Rounded = float;
  struct Weights {
    Floats even, odd;  // the first and the second input of the pair
  };
  struct Inputs {
    Floats even, odd;
  };
  static constexpr int kBf16Rows = 12;
  static constexpr int bf16_vectors(int64_t rows) { return rows <= 4 ? 4 : 2; }
  static Weights weights(const uint16_t* p) {
    const Ints pairs = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, set_ints(static_cast<int32_t>(0xffff0000u))))};
  }
  static void round_row(const float* x, int64_t k, float* out) { round_row_as_floats<Words>(x, k, out); }
  static Inputs inputs(const float* p) { return {set(p[0]), set(p[1])}; }
  static Floats dot2(Floats sum, Weights w, Inputs x) {
    return add_product(add_product(sum, w.even, x.even), w.odd, x.odd);
  }
#endif

  static constexpr int kQuantizedRows = 6;
  static constexpr int quantized_vectors(int64_t) { return 2; }
  static constexpr int zero_point(int) { return 0; }
  static Floats halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int kRows, int kVectors, int kBits, bool kOnlyPass>
  __attribute__((always_inline)) static inline void dot32(Ints (&dots)[kRows][kVectors], const uint8_t* w,
                                                          const int8_t* q, int64_t stride, uintptr_t ahead) {
    const Ints low_half = _mm512_set1_epi8(15);
    PHI3_UNROLL
    for (int k = 0; k < 32; k += 32 / kBits) {
      fetch_step<kBits, kOnlyPass>(ahead, k * kBits / 32);
      Ints low[kVectors], high[kVectors];
      PHI3_EACH (v, kVectors) {
        low[v] = _mm512_loadu_si512(w + k * 4 * kBits + 64 * v);
        if constexpr (kBits == 4) {
          high[v] = _mm512_and_si512(_mm512_srli_epi16(low[v], 4), low_half);
          low[v] = _mm512_and_si512(low[v], low_half);
        }
      }
      PHI3_EACH (r, kRows) {
        const Ints first = quad(q + r * stride + k);
        PHI3_EACH (v, kVectors) dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], low[v], first);
        if constexpr (kBits == 4) {
          const Ints second = quad(q + r * stride + k + 4);
          PHI3_EACH (v, kVectors) dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], high[v], second);
        }
      }
    }
  }

  static Ints magnitude_bits(Floats a) { return _mm512_and_si512(_mm512_castps_si512(a), set_ints(0x7fffffff)); }
  static Ints bits_max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static int32_t total(Ints a) { return _mm512_reduce_add_epi32(a); }
  static Ints round_to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
  static void store_bytes(int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }

  static Ints quad(const void* p) {
    int32_t four_bytes;
    __builtin_memcpy(&four_bytes, p, 4);
    return _mm512_set1_epi32(four_bytes);
  }
};

}  // namespace phi3
