// Integers of four or eight bits as bfloat16, which holds each of them exactly; and what the two kernels share.
#pragma once
#include "intrinsics.h"
#include "linear.h"

namespace phi3 {

#if defined(PHI3_EMULATED)
inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    y |= ((from < 4 ? a : b) >> (from % 4 * 8) & 255) << (8 * i);
  }
  return y;
}
inline unsigned mask_or(unsigned x, unsigned mask, unsigned ones) { return (x & mask) | ones; }
template <class T>
void in_register(T&) {}
inline unsigned subtract_pairs(unsigned a, unsigned b) {
  return pack_bf16(low_float(a) - low_float(b), high_float(a) - high_float(b));
}
#else
PHI3_DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {  // byte i is that of digit i, b's from 4
  return __byte_perm(a, b, selector);
}
PHI3_DEVICE unsigned mask_or(unsigned x, unsigned mask, unsigned ones) {
  unsigned y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(ones));
  return y;
}
template <class T>
PHI3_DEVICE void in_register(T& x) {  // rather than computed anew at each use
  asm volatile("" : "+r"(x));
}
PHI3_DEVICE unsigned subtract_pairs(unsigned a, unsigned b) {  // of bfloat16
  unsigned y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(b), "r"(0xbf80bf80u), "r"(a));
  return y;
}
#endif

// The kernels multiply eight neighbouring inputs as four pairs, in an order that suits the integers; `of_x` brings eight
// numbers of x into the same order. The integers become q - zero: -8 to 7, or -128 to 127. `mask` is handed to `load`,
// held in a register: the compiler would load the constant for each use.
template <int bits>
struct Eight;

template <>
struct Eight<4> {  // pairs of inputs i and i + 4
  static constexpr int zero = 8;
  static constexpr unsigned mask = 0x000f000f;
  static PHI3_DEVICE void load(unsigned (&pairs)[4], const unsigned char* shared, unsigned mask) {
    const unsigned word = *reinterpret_cast<const unsigned*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i)  // 0x4300 is 128, and its last bits are ones
      pairs[i] = subtract_pairs(mask_or(word >> (4 * i), mask, 0x43004300u), 0x43084308u);
  }
  static PHI3_DEVICE void of_x(unsigned (&pairs)[4], uint4 x) {
    pairs[0] = permute_bytes(x.x, x.z, 0x5410), pairs[1] = permute_bytes(x.x, x.z, 0x7632);
    pairs[2] = permute_bytes(x.y, x.w, 0x5410), pairs[3] = permute_bytes(x.y, x.w, 0x7632);
  }
};

template <>
struct Eight<8> {  // pairs of neighbours
  static constexpr int zero = 128;
  static constexpr unsigned mask = 0x007f007f;
  static PHI3_DEVICE void load(unsigned (&pairs)[4], const unsigned char* shared, unsigned mask) {
    const uint2 words = *reinterpret_cast<const uint2*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned two = permute_bytes(i < 2 ? words.x : words.y, 0, i % 2 ? 0x4342 : 0x4140);
      // 128 and the seven lower bits, minus 128 or 256 by the upper bit.
      pairs[i] = subtract_pairs(mask_or(two, mask, 0x43004300u), (two & 0x00800080u) ^ 0x43804380u);
    }
  }
  static PHI3_DEVICE void of_x(unsigned (&pairs)[4], uint4 x) {
    pairs[0] = x.x, pairs[1] = x.y, pairs[2] = x.z, pairs[3] = x.w;
  }
};

// warp: adds the sums of x's eight inputs; c[k] is that of the row whose product is in c[k].
PHI3_DEVICE void sum_of_x(float (&c)[4], const unsigned (&pairs)[4]) {
  constexpr unsigned one = 0x3f803f80;
  multiply_add(c, {one, one, one, one}, pairs[0], pairs[1]);
  multiply_add(c, {one, one, one, one}, pairs[2], pairs[3]);
}

// Row i of the weights of a block whose first output is `first`: which output it is for, and where it is in memory.
PHI3_DEVICE int output_of(const Product& p, int first, int i) { return first + (p.gated ? i / 16 * 8 + i % 8 : i); }
PHI3_DEVICE int row_of(const Product& p, int output, int i) { return output + (p.gated ? i / 8 % 2 * p.outputs : 0); }

PHI3_DEVICE float gate(float gate, float up) { return up * __fdividef(gate, 1 + fast_exp2(-1.442695041f * gate)); }
PHI3_DEVICE void store(const Product& p, int row, int output, float sum) {
  const int64 at = static_cast<int64>(row) * p.outputs + output;
  if (p.float32)
    static_cast<float*>(p.y)[at] = sum;
  else
    static_cast<bf16*>(p.y)[at] = to_bf16(sum);
}

}  // namespace phi3
