// aarch64's NEON: 4 floats to a vector, 32 registers.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace phi3 {

typedef float32x4_t V;
constexpr int kLanes = 4;
constexpr int kDots = 16;
constexpr int kSums = 24;
constexpr int kTileVectors = 4;
constexpr int kTileSums = 16;
constexpr int kValueVectors = 4;

inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V maximum(V a, V b) { return vmaxq_f32(a, b); }  // NaN if either is

inline V load(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline V load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

// Lane i is the sum of the lanes of a[i].
inline V dots(const V* a) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }

typedef int32_t I __attribute__((vector_size(16)));
inline unsigned bits(I mask) {
  const uint32_t lane_bits[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(reinterpret_cast<uint32x4_t>(mask), vld1q_u32(lane_bits)));
}

}  // namespace phi3
