// What the attention kernels share: reading queries, who sees what, and writing results.
#pragma once
#include "attention.h"
#include "intrinsics.h"

namespace phi3 {

// Where maxima start: finite, so that -inf minus a maximum is -inf, and 2^-inf is 0.
constexpr float kLowest = -3.4028234663852886e38f;
#define PHI3_NOTHING __uint_as_float(0xff800000u)  // -inf: the score of a hidden key

// Four neighbours in memory, at an address that is a multiple of their size: as they are stored, and as floats.
template <class C>
struct Four;
template <>
struct Four<float> {
  uint4 bits;
  PHI3_DEVICE void load(const float* p) { bits = load16(p); }
  PHI3_DEVICE void floats(float (&x)[4]) const {
    x[0] = __uint_as_float(bits.x), x[1] = __uint_as_float(bits.y);
    x[2] = __uint_as_float(bits.z), x[3] = __uint_as_float(bits.w);
  }
};
template <>
struct Four<bf16> {
  uint2 bits;
  PHI3_DEVICE void load(const bf16* p) { bits = load8(p); }
  PHI3_DEVICE void floats(float (&x)[4]) const {
    x[0] = low_float(bits.x), x[1] = high_float(bits.x), x[2] = low_float(bits.y), x[3] = high_float(bits.y);
  }
};
template <>
struct Four<int8> {
  unsigned bits;
  PHI3_DEVICE void load(const int8* p) { bits = load4(p); }
  PHI3_DEVICE void floats(float (&x)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = static_cast<float>(static_cast<int8>(bits >> 8 * i & 255));
  }
};

PHI3_DEVICE float query(const AttentionOperands& o, int64 i) {
  return o.q_is_bf16 ? to_float(static_cast<const bf16*>(o.q)[i]) : static_cast<const float*>(o.q)[i];
}
PHI3_DEVICE void write_output(const AttentionOperands& o, int64 i, float x) {
  if (o.q_is_bf16)
    static_cast<bf16*>(o.out)[i] = to_bf16(x);
  else
    static_cast<float*>(o.out)[i] = x;
}

// The place of a query row in [B, T, N], of which H numbers belong to it.
PHI3_DEVICE int64 place(const AttentionOperands& o, int b, int head, int row) {
  const int G = o.N / o.K;
  return (static_cast<int64>(b) * o.T + row / G) * o.N + head * G + row % G;
}

// What a query row may see: positions in (low, high] of its segment. Padding, and rows behind the last, see nothing.
struct Sight {
  int low = -1, high = -1, segment = 0;

  PHI3_DEVICE bool sees(int position, int of_segment) const {
    return low < position && position <= high && segment == of_segment;
  }
};
PHI3_DEVICE Sight sight(const AttentionOperands& o, int b, int row) {
  Sight s;
  const int token = row / (o.N / o.K);
  if (token >= o.T) return s;
  s.high = o.q_positions[b * o.T + token];
  if (s.high < 0) s.high = -1;
  if (o.window > 0 && s.high >= o.window) s.low = s.high - o.window;
  if (o.q_segments) s.segment = o.q_segments[b * o.T + token];
  return s;
}

}  // namespace phi3
