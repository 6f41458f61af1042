// Attention of a few query rows (decoding): bound by reading keys and values once. Any number of rows works.
//
// A block has one key-value head, up to R of its query rows and a part of the slots: every splits-th group of 32, so
// that parts are alike however many slots are in use. Its warps read slots on their own; 8 lanes share a key, and hold
// the sums of the values' elements that they read. What groups of lanes, warps and blocks have found is merged at the
// end.
#include "attention_rows.h"

namespace phi3 {
namespace {

constexpr int kLanesPerKey = 8;
constexpr int kKeysAtOnce = 32 / kLanesPerKey;
template <class C, int R>
constexpr int kStepsOf = R == 4 || sizeof(C) == 4 ? 2 : 4;  // that are loaded before the first is used
constexpr int kWarps = kFewThreads / 32;

template <int H, int R>
struct FewSums {
  float values[R][H / 32][4];  // of elements 4 * (lane % 8) + 32 * i on
  float most[R], total[R];
};

// Adds the keys from slot `first` + `begin` on, those that no row sees (bits of `seen`) left aside.
template <class C, int H, int R>
PHI3_DEVICE void add_keys(const float (&q)[R][H / 32][4], const Sight (&rows)[R], const C* k, const C* v,
                          const float* k_scale, const float* v_scale, int row_length, int first, int begin,
                          unsigned seen, int position, int segment, FewSums<H, R>& sums) {
  constexpr int kSteps = kStepsOf<C, R>;
  const int lane = threadIdx.x % 32, part = lane % kLanesPerKey;
  Four<C> keys[kSteps][H / 32] = {}, values[kSteps][H / 32] = {};  // zeros: what nobody sees may be NaN
  float factors[kSteps], scales[kSteps];
  int at[kSteps];
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    at[u] = begin + u * kKeysAtOnce + lane / kLanesPerKey;
    factors[u] = scales[u] = 1;
    if (!(seen >> at[u] & 1)) continue;
    const int64 row = static_cast<int64>(first + at[u]) * row_length + 4 * part;
#pragma unroll
    for (int i = 0; i < H / 32; ++i) keys[u][i].load(k + row + 32 * i);
#pragma unroll
    for (int i = 0; i < H / 32; ++i) values[u][i].load(v + row + 32 * i);
    if (k_scale) factors[u] = k_scale[first + at[u]], scales[u] = v_scale[first + at[u]];
  }
  float scores[R][kSteps];
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    const int where = shuffle(position, at[u]), which = shuffle(segment, at[u]);
    float dots[R] = {};
#pragma unroll
    for (int i = 0; i < H / 32; ++i) {
      float key[4];
      keys[u][i].floats(key);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 4; ++j) dots[r] = fmaf(q[r][i][j], key[j], dots[r]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float dot = warp_sum<kLanesPerKey>(dots[r]);
      scores[r][u] = rows[r].sees(where, which) ? dot * factors[u] : PHI3_NOTHING;
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float most = sums.most[r];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) most = fmaxf(most, scores[r][u]);
    const float decay = fast_exp2(sums.most[r] - most);
    sums.most[r] = most;
    sums.total[r] *= decay;
#pragma unroll
    for (int i = 0; i < H / 32; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.values[r][i][j] *= decay;
  }
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    bool hidden[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      hidden[r] = R > 1 && scores[r][u] == PHI3_NOTHING;  // a value that this row does not see may be NaN
      const float p = fast_exp2(scores[r][u] - sums.most[r]);
      sums.total[r] += p;
      scores[r][u] = p * scales[u];
    }
#pragma unroll
    for (int i = 0; i < H / 32; ++i) {
      float value[4];
      values[u][i].floats(value);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float before = sums.values[r][i][j], after = fmaf(scores[r][u], value[j], before);
          sums.values[r][i][j] = hidden[r] ? before : after;
        }
    }
  }
}

// Merges what the warp's groups of lanes have found; each of them has it then.
template <int H, int R>
PHI3_DEVICE void merge_lanes(FewSums<H, R>& sums) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int mask = kLanesPerKey; mask < 32; mask *= 2) {
      const float other = shuffle_xor(sums.most[r], mask), most = fmaxf(sums.most[r], other);
      const float weight = fast_exp2(sums.most[r] - most), other_weight = fast_exp2(other - most);
      sums.most[r] = most;
      sums.total[r] = sums.total[r] * weight + shuffle_xor(sums.total[r], mask) * other_weight;
#pragma unroll
      for (int i = 0; i < H / 32; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& sum = sums.values[r][i][j];
          sum = sum * weight + shuffle_xor(sum, mask) * other_weight;
        }
    }
}

template <class C, int H, int R>
PHI3_DEVICE void attend_few(const AttentionOperands& o) {
  PHI3_SHARED(float, merged, [kWarps][R][H + 2]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.y;
  const int head = blockIdx.x % o.K, first_row = blockIdx.x / o.K * R, b = blockIdx.z;
  const int64 row_of_cache = ((static_cast<int64>(*o.layer) * o.B + b) * o.K + head) * o.S;
  const C* const k = static_cast<const C*>(o.k) + row_of_cache * o.row_length;
  const C* const v = static_cast<const C*>(o.v) + row_of_cache * o.row_length;
  const float* const k_scale = sizeof(C) == 1 ? o.k_scale + row_of_cache : nullptr;
  const float* const v_scale = sizeof(C) == 1 ? o.v_scale + row_of_cache : nullptr;
  const int rows_of_head = o.T * (o.N / o.K);

  float q[R][H / 32][4];
  Sight rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rows[r] = sight(o, b, first_row + r);
    const bool is_there = first_row + r < rows_of_head;
    const int64 from = is_there ? place(o, b, head, first_row + r) * H + 4 * (lane % kLanesPerKey) : 0;
    // log2(e): p is taken as a power of 2.
#pragma unroll
    for (int i = 0; i < H / 32; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        q[r][i][j] = is_there ? query(o, from + 32 * i + j) * (1.4426950408889634f * rsqrtf(H)) : 0;
  }
  FewSums<H, R> sums = {};
#pragma unroll
  for (int r = 0; r < R; ++r) sums.most[r] = kLowest;

  const int stride = o.splits * kWarps * kFewKeys;
  const auto position_at = [&](int slot) { return slot < o.S ? o.k_positions[b * o.S + slot] : -1; };
  int first = (warp * o.splits + split) * kFewKeys, next = position_at(first + lane);
  for (; first < o.S; first += stride) {
    const int position = next;
    next = first < o.S - stride ? position_at(first + stride + lane) : -1;
    const int segment = o.k_segments && first + lane < o.S ? o.k_segments[b * o.S + first + lane] : 0;
    bool some = false;
#pragma unroll
    for (int r = 0; r < R; ++r) some |= rows[r].sees(position, segment);
    const unsigned seen = ballot(some);
    constexpr int kTogether = kStepsOf<C, R> * kKeysAtOnce;
#pragma unroll 1
    for (int begin = 0; begin < kFewKeys; begin += kTogether)
      if (seen >> begin & ((1u << kTogether) - 1))
        add_keys<C, H, R>(q, rows, k, v, k_scale, v_scale, o.row_length, first, begin, seen, position, segment, sums);
  }

  merge_lanes(sums);
  if (lane < kLanesPerKey) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < H / 32; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) merged[warp][r][4 * lane + 32 * i + j] = sums.values[r][i][j];
      if (lane == 0) merged[warp][r][H] = sums.most[r], merged[warp][r][H + 1] = sums.total[r];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < R * H; i += kFewThreads) {
    const int r = i / H, h = i % H, row = first_row + r;
    if (row >= rows_of_head) break;
    float most = kLowest, total = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, merged[w][r][H]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = fast_exp2(merged[w][r][H] - most);
      total += weight * merged[w][r][H + 1];
      sum += weight * merged[w][r][h];
    }
    if (o.splits == 1) {
      write_output(o, place(o, b, head, row) * H + h, total == 0 ? 0.f : sum / total);
      continue;
    }
    const int64 number = (static_cast<int64>(b) * o.K + head) * rows_of_head + row;
    float* const partial = o.partials + (number * o.splits + split) * (H + 2);
    partial[h] = sum;
    if (h == 0) partial[H] = most, partial[H + 1] = total;
  }
}

}  // namespace

#define PHI3_FEW(type, H, R) \
  PHI3_KERNEL(kFewThreads, attend_few_##type##_##H##_##R, AttentionOperands o) { attend_few<type, H, R>(o); }
#define PHI3_FEW_ROWS(type, H) PHI3_FEW(type, H, 1) PHI3_FEW(type, H, 2) PHI3_FEW(type, H, 4)
#define PHI3_FEW_HEADS(type) PHI3_FEW_ROWS(type, 64) PHI3_FEW_ROWS(type, 96) PHI3_FEW_ROWS(type, 128)
PHI3_FEW_HEADS(float)
PHI3_FEW_HEADS(bf16)
PHI3_FEW_HEADS(int8)

// Merges the parts of the slots; a block for each query row.
PHI3_KERNEL(kMergeThreads, attend_merge, AttentionOperands o, int H) {
  const int G = o.N / o.K, h = threadIdx.x, row = blockIdx.x % (o.T * G), head = blockIdx.x / (o.T * G) % o.K;
  const int b = blockIdx.x / (o.T * G) / o.K;
  if (h >= H) return;
  const float* const partials = o.partials + static_cast<int64>(blockIdx.x) * o.splits * (H + 2);
  float most = kLowest, total = 0, sum = 0;
  for (int i = 0; i < o.splits; ++i) most = fmaxf(most, partials[i * (H + 2) + H]);
  for (int i = 0; i < o.splits; ++i) {
    const float weight = fast_exp2(partials[i * (H + 2) + H] - most);
    total += weight * partials[i * (H + 2) + H + 1];
    sum += weight * partials[i * (H + 2) + h];
  }
  write_output(o, place(o, b, head, row) * H + h, total == 0 ? 0.f : sum / total);
}

}  // namespace phi3
