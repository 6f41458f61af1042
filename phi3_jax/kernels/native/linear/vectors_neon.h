// NEON of every 64-bit ARM (armv8-a): bf16 widened to float32, bytes multiplied to 16 bits.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "linear/fetch.h"
#include "linear/round_row.h"
#include "linear/unroll.h"

namespace phi3 {

struct V {
  static constexpr int kLanes = 4;
  using Floats = float32x4_t;
  using Ints = int32x4_t;
  typedef uint32_t Words __attribute__((vector_size(16)));

  static Floats zero() { return vdupq_n_f32(0); }
  static Floats load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Floats a) { vst1q_f32(p, a); }
  static Floats set(float a) { return vdupq_n_f32(a); }
  static Floats product(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats add_product(Floats a, Floats b, Floats c) { return vfmaq_f32(a, b, c); }
  static Floats to_floats(Ints a) { return vcvtq_f32_s32(a); }
  static Ints set_ints(int32_t a) { return vdupq_n_s32(a); }

  using Rounded = float;
  struct Weights {
    Floats even, odd;  // the first and the second input of the pair
  };
  using Inputs = float32x2_t;
  static constexpr int kBf16Rows = 4;
  static constexpr int bf16_vectors(int64_t rows) { return rows == 1 ? 16 : rows == 2 ? 8 : 4; }
  static Weights weights(const uint16_t* p) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(p));
    return {vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)),
            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)))};
  }
  static void round_row(const float* x, int64_t k, float* out) { round_row_as_floats<Words>(x, k, out); }
  static Inputs inputs(const float* p) { return vld1_f32(p); }
  static Floats dot2(Floats sum, Weights w, Inputs x) {
    return vfmaq_lane_f32(vfmaq_lane_f32(sum, w.even, x, 0), w.odd, x, 1);
  }

  static constexpr int kQuantizedRows = 4;
  static constexpr int quantized_vectors(int64_t rows) { return rows == 1 ? 8 : 2; }
  static constexpr int zero_point(int bits) { return bits == 8 ? 128 : 0; }
  static Floats halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  // A vector holds 4 outputs x 4 inputs of weights. Products are summed in 16 bits while they fit, two of 8 bits
  // (2 * 127 * 127) or eight of 4 bits (8 * 15 * 127), each half of the outputs for itself, then pairwise down to 4
  // sums.
  template <int kRows, int kVectors, int kBits, bool kOnlyPass>
  __attribute__((always_inline)) static inline void dot32(Ints (&dots)[kRows][kVectors], const uint8_t* w,
                                                          const int8_t* q, int64_t stride, uintptr_t ahead) {
    if constexpr (kBits == 8) {
      const uint8x16_t zero = vdupq_n_u8(0x80);
      for (int k = 0; k < 32; k += 8) {
        fetch_step<kBits, kOnlyPass>(ahead, k / 4);
        fetch_step<kBits, kOnlyPass>(ahead, k / 4 + 1);
        int8x16_t first[kVectors], second[kVectors];
        PHI3_EACH (v, kVectors) {
          first[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + k * 32 + 16 * v), zero));
          second[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + k * 32 + 128 + 16 * v), zero));
        }
        PHI3_EACH (r, kRows) {
          const int8x16_t x = quad(q + r * stride + k), next = quad(q + r * stride + k + 4);
          PHI3_EACH (v, kVectors) {
            int16x8_t low = vmull_s8(vget_low_s8(first[v]), vget_low_s8(x));
            int16x8_t high = vmull_high_s8(first[v], x);
            low = vmlal_s8(low, vget_low_s8(second[v]), vget_low_s8(next));
            high = vmlal_high_s8(high, second[v], next);
            dots[r][v] = vaddq_s32(dots[r][v], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
          }
        }
      }
    } else {
      const uint8x16_t low_half = vdupq_n_u8(15);
      int16x8_t low[kRows][kVectors], high[kRows][kVectors];
      PHI3_UNROLL
      for (int k = 0; k < 32; k += 8) {
        fetch_step<kBits, kOnlyPass>(ahead, k / 8);
        int8x16_t first[kVectors], second[kVectors];
        PHI3_EACH (v, kVectors) {
          const uint8x16_t both = vld1q_u8(w + k * 16 + 16 * v);
          first[v] = vreinterpretq_s8_u8(vandq_u8(both, low_half));
          second[v] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        }
        PHI3_EACH (r, kRows) {
          const int8x16_t x = quad(q + r * stride + k), next = quad(q + r * stride + k + 4);
          PHI3_EACH (v, kVectors) {
            low[r][v] = k == 0 ? vmull_s8(vget_low_s8(first[v]), vget_low_s8(x))
                               : vmlal_s8(low[r][v], vget_low_s8(first[v]), vget_low_s8(x));
            high[r][v] = k == 0 ? vmull_high_s8(first[v], x) : vmlal_high_s8(high[r][v], first[v], x);
            low[r][v] = vmlal_s8(low[r][v], vget_low_s8(second[v]), vget_low_s8(next));
            high[r][v] = vmlal_high_s8(high[r][v], second[v], next);
          }
        }
      }
      PHI3_EACH (r, kRows)
        PHI3_EACH (v, kVectors)
          dots[r][v] = vaddq_s32(dots[r][v], vpaddq_s32(vpaddlq_s16(low[r][v]), vpaddlq_s16(high[r][v])));
    }
  }

  static Ints magnitude_bits(Floats a) { return vreinterpretq_s32_f32(vabsq_f32(a)); }
  static Ints bits_max(Ints a, Ints b) { return vmaxq_s32(a, b); }
  static int32_t largest(Ints a) { return vmaxvq_s32(a); }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static int32_t total(Ints a) { return vaddvq_s32(a); }
  static Ints round_to_ints(Floats a) { return vcvtnq_s32_f32(a); }
  static void store_bytes(int8_t* p, Ints a) {
    const int16x4_t words = vmovn_s32(a);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    __builtin_memcpy(p, &bytes, 4);
  }

  static int8x16_t quad(const void* p) {
    int32_t four_bytes;
    __builtin_memcpy(&four_bytes, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four_bytes));
  }
};

}  // namespace phi3
