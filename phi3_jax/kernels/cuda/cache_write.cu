// New tokens' keys and values -> the slots of their positions, rounded to the cache's type; and rotary positions before.
// A block has one token, a warp of it one head at a time.
#include "attention.h"
#include "intrinsics.h"

namespace phi3 {
namespace {

constexpr int kOfLane = kLargestHead / 32;  // elements of a head that a lane has: lane + 32 * i

PHI3_DEVICE float number(const WriteOperands& o, const void* p, int64 i) {
  return o.new_is_bf16 ? to_float(static_cast<const bf16*>(p)[i]) : static_cast<const float*>(p)[i];
}

// One head's elements, of which the pairs (i, i + R) are rotated if `rotated`; rounded to the type that they came in.
PHI3_DEVICE void load_head(const WriteOperands& o, const void* from, int64 head, int64 angles, bool rotated,
                           float (&x)[kOfLane]) {
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int h = threadIdx.x % 32 + 32 * i;
    x[i] = h < o.H ? number(o, from, head + h) : 0.f;
    if (!rotated || h >= 2 * o.R) continue;
    const int angle = h < o.R ? h : h - o.R;
    const float other = number(o, from, head + (h < o.R ? h + o.R : angle));
    const float cos = number(o, o.cos, angles + angle), sin = number(o, o.sin, angles + angle);
    x[i] = h < o.R ? x[i] * cos - other * sin : x[i] * cos + other * sin;
    if (o.new_is_bf16) x[i] = to_float(to_bf16(x[i]));
  }
}

PHI3_DEVICE void store(float* row, int h, float x, float) { row[h] = x; }
PHI3_DEVICE void store(bf16* row, int h, float x, float) { row[h] = to_bf16(x); }
PHI3_DEVICE void store(int8* row, int h, float x, float scale) {
  row[h] = static_cast<int8>(scale > 0 ? __float2int_rn(x / scale) : 0);
}

template <class C>
PHI3_DEVICE void store_head(const WriteOperands& o, const float (&x)[kOfLane], C* cache, float* scales, int64 slot) {
  const int lane = threadIdx.x % 32;
  float scale = 0;
  if (sizeof(C) == 1) {
    float most = 0, zero_or_nan = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) most = fmaxf(most, fabsf(x[i])), zero_or_nan += x[i] - x[i];
    // NaN for a NaN or infinity: then the token's scores and values are NaN too.
    scale = warp_max(most) / 127 + warp_sum(zero_or_nan);
    if (lane == 0) scales[slot] = scale;
  }
#pragma unroll
  for (int i = 0; i < kOfLane; ++i)
    if (lane + 32 * i < o.H) store(cache + slot * o.row_length, lane + 32 * i, x[i], scale);
  for (int h = o.H + lane; h < o.row_length; h += 32) store(cache + slot * o.row_length, h, 0, 0);
}

template <class C>
PHI3_DEVICE void write_token(const WriteOperands& o) {
  const int t = blockIdx.x, b = blockIdx.y, lane = threadIdx.x % 32;
  const int64 token = static_cast<int64>(b) * o.T + t;
  const int position = o.positions[token];
  // Of several tokens in one slot the one with the latest position stays.
  bool beaten = false;
  for (int i = threadIdx.x; i < o.T; i += kWriteThreads) {
    const int other = o.positions[static_cast<int64>(b) * o.T + i];
    beaten |= other > position || (other == position && i > t) ? other % o.S == position % o.S : false;
  }
  const bool stored = !block_any(beaten) && position >= 0;
  for (int i = threadIdx.x / 32; i < o.N + 2 * o.K; i += kWriteThreads / 32) {
    float x[kOfLane];
    const bool is_query = i < o.N, is_key = !is_query && i < o.N + o.K;
    const int head = is_query ? i : (i - o.N) % o.K;
    if (!is_query && !stored) continue;
    const void* const from = is_query ? o.new_q : is_key ? o.new_k : o.new_v;
    load_head(o, from, token * o.token_stride + head * o.H, token * o.R, is_query || is_key, x);
    const int64 slot = ((static_cast<int64>(*o.layer) * o.B + b) * o.K + head) * o.S + position % o.S;
    if (is_key) store_head(o, x, static_cast<C*>(o.k), o.k_scale, slot);
    if (!is_query && !is_key) store_head(o, x, static_cast<C*>(o.v), o.v_scale, slot);
    if (!is_query) continue;
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const int h = lane + 32 * j;
      if (h >= o.H) break;
      const int64 place = (token * o.N + head) * o.H + h;
      if (o.new_is_bf16)
        static_cast<bf16*>(o.q)[place] = to_bf16(x[j]);
      else
        static_cast<float*>(o.q)[place] = x[j];
    }
  }
}

}  // namespace

#define PHI3_WRITE(type) \
  PHI3_KERNEL(kWriteThreads, cache_write_##type, WriteOperands o) { write_token<type>(o); }
PHI3_WRITE(float)
PHI3_WRITE(bf16)
PHI3_WRITE(int8)

}  // namespace phi3
