// AVX2: bf16 widened to float32, integers multiplied in pairs of bytes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "linear/fetch.h"
#include "linear/round_row.h"
#include "linear/unroll.h"

namespace phi3 {

struct V {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  using Ints = __m256i;
  typedef uint32_t Words __attribute__((vector_size(32)));

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static Floats set(float a) { return _mm256_set1_ps(a); }
  static Floats product(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats add_product(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(b, c, a); }
  static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
  static Ints set_ints(int32_t a) { return _mm256_set1_epi32(a); }

  using Rounded = float;
  struct Weights {
    Floats even, odd;  // the first and the second input of the pair
  };
  struct Inputs {
    Floats even, odd;
  };
  static constexpr int kBf16Rows = 4;
  static constexpr int bf16_vectors(int64_t rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
  static Weights weights(const uint16_t* p) {
    const Ints pairs = load_ints(p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, set_ints(static_cast<int32_t>(0xffff0000u))))};
  }
  static void round_row(const float* x, int64_t k, float* out) { round_row_as_floats<Words>(x, k, out); }
  static Inputs inputs(const float* p) { return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1)}; }
  static Floats dot2(Floats sum, Weights w, Inputs x) {
    return add_product(add_product(sum, w.even, x.even), w.odd, x.odd);
  }

  static constexpr int kQuantizedRows = 4;
  static constexpr int quantized_vectors(int64_t rows) { return rows == 1 ? 4 : 2; }
  static constexpr int zero_point(int bits) { return bits == 8 ? 128 : 0; }
  static Floats halves(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // The one instruction that multiplies bytes wants one side unsigned, and its sums of two products must fit 16 bits:
  // |q| * (sign(q) * (w - 128)) for 8 bits, at most 2 * 127 * 127; w * q for 4 bits, where even 8 such sums fit.
  template <int kRows, int kVectors, int kBits, bool kOnlyPass>
  __attribute__((always_inline)) static inline void dot32(Ints (&dots)[kRows][kVectors], const uint8_t* w,
                                                          const int8_t* q, int64_t stride, uintptr_t ahead) {
    const Ints ones = _mm256_set1_epi16(1);
    if constexpr (kBits == 8) {
      const Ints zero = _mm256_set1_epi8(static_cast<char>(0x80));
      for (int k = 0; k < 32; k += 4) {
        fetch_step<kBits, kOnlyPass>(ahead, k / 4);
        Ints signed_weights[kVectors];
        PHI3_EACH (v, kVectors) signed_weights[v] = _mm256_xor_si256(load_ints(w + k * 32 + 32 * v), zero);
        PHI3_EACH (r, kRows) {
          const Ints x = quad(q + r * stride + k), magnitude = _mm256_abs_epi8(x);
          PHI3_EACH (v, kVectors) {
            const Ints sums = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(signed_weights[v], x));
            dots[r][v] = _mm256_add_epi32(dots[r][v], _mm256_madd_epi16(sums, ones));
          }
        }
      }
    } else {
      const Ints low_half = _mm256_set1_epi8(15);
      Ints sums[kRows][kVectors];
      PHI3_UNROLL
      for (int k = 0; k < 32; k += 8) {
        fetch_step<kBits, kOnlyPass>(ahead, k / 8);
        Ints low[kVectors], high[kVectors];
        PHI3_EACH (v, kVectors) {
          const Ints both = load_ints(w + k * 16 + 32 * v);
          low[v] = _mm256_and_si256(both, low_half);
          high[v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_half);
        }
        PHI3_EACH (r, kRows) {
          const Ints first = quad(q + r * stride + k), second = quad(q + r * stride + k + 4);
          PHI3_EACH (v, kVectors) {
            const Ints sum =
                _mm256_add_epi16(_mm256_maddubs_epi16(low[v], first), _mm256_maddubs_epi16(high[v], second));
            sums[r][v] = k == 0 ? sum : _mm256_add_epi16(sums[r][v], sum);
          }
        }
      }
      PHI3_EACH (r, kRows)
        PHI3_EACH (v, kVectors) dots[r][v] = _mm256_add_epi32(dots[r][v], _mm256_madd_epi16(sums[r][v], ones));
    }
  }

  static Ints magnitude_bits(Floats a) { return _mm256_and_si256(_mm256_castps_si256(a), set_ints(0x7fffffff)); }
  static Ints bits_max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
  static int32_t largest(Ints a) {
    alignas(32) int32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<Ints*>(lanes), a);
    int32_t most = lanes[0];
    for (int32_t lane : lanes) most = lane > most ? lane : most;
    return most;
  }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static int32_t total(Ints a) {
    alignas(32) int32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<Ints*>(lanes), a);
    int32_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    return sum;
  }
  static Ints round_to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
  static void store_bytes(int8_t* p, Ints a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

  static Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const Ints*>(p)); }
  static Ints quad(const void* p) {
    int32_t four_bytes;
    __builtin_memcpy(&four_bytes, p, 4);
    return _mm256_set1_epi32(four_bytes);
  }
};

}  // namespace phi3
