// Attention of many query rows (prefill) on tensor cores: a block has 64 rows of one key-value head, 16 a warp, and
// goes through the slots in groups of 64, of which it skips those where no row sees any. Queries, keys and p are
// bfloat16 in the products, and all sums float32.
//
// While scores are computed the values are on their way to shared memory, and the next keys during the sums of values.
// Integers are fetched to registers instead, and written to shared memory as bfloat16, which holds every int8; their
// scales go into scores and p.
#include "attention_rows.h"

namespace phi3 {
namespace {

constexpr int kWarps = kBlockThreads / 32;
constexpr int kKeys = kBlockKeys, kTiles = kKeys / 8;

// 64 keys or values as [key][H + 8] bfloat16: 16 more bytes a row, and 8 rows lie in different banks.
template <class C, int H>
struct Fetched {
  static constexpr int kEach = 16 / sizeof(C), kPieces = kKeys * H / kEach / kBlockThreads;  // elements; of a thread
  static constexpr int kRow = H + 8;
  uint4 pieces[sizeof(C) == 1 ? kPieces : 1];
  float scale;

  // Asks for slots [first, first + 64) of a head. Those that are behind the last, or not `wanted`, become zeros, because
  // what nobody sees may be NaN.
  template <class F>
  PHI3_DEVICE void ask(const C* from, const float* scales, int row_length, int first, const F& wanted, bf16* tile) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * kBlockThreads, key = piece / (H / kEach), h = piece % (H / kEach) * kEach;
      const bool is_wanted = wanted(first + key);
      const C* const p = from + (is_wanted ? static_cast<int64>(first + key) * row_length + h : 0);
      if (sizeof(C) == 2)
        copy16_async(tile + key * kRow + h, p, is_wanted);
      else
        pieces[i] = is_wanted ? load16(p) : uint4{0, 0, 0, 0};
    }
    if (sizeof(C) == 2)
      commit_copies();
    else if (threadIdx.x < kKeys)
      scale = wanted(first + threadIdx.x) ? scales[first + threadIdx.x] : 0.f;
  }

  // They are in shared memory after the next barrier.
  PHI3_DEVICE void arrive(bf16* tile, float* scales) {
    if (sizeof(C) == 2) return wait_copies<0>();
    if (threadIdx.x < kKeys) scales[threadIdx.x] = scale;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * kBlockThreads, key = piece / (H / kEach), h = piece % (H / kEach) * kEach;
      const unsigned given[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
      unsigned made[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned pair = given[j / 2] >> 16 * (j % 2);
        made[j] = pack_bf16(static_cast<int8>(pair & 255), static_cast<int8>(pair >> 8 & 255));
      }
      store16(tile + key * kRow + h, uint4{made[0], made[1], made[2], made[3]});
      store16(tile + key * kRow + h + 8, uint4{made[4], made[5], made[6], made[7]});
    }
  }
};

// What the rows of a block see together: some of them positions in (some_low, some_high] and segments from first to
// last, all of them (every_low, every_high] if there is one segment. Padding does not count.
struct Bounds {
  int some_low = 0x7fffffff, some_high = -1, every_low = -1, every_high = 0x7fffffff;
  int first_segment = 0x7fffffff, last_segment = -0x7fffffff - 1;

  PHI3_DEVICE void add(const Sight& row) {
    if (row.high < 0) return;
    some_low = min(some_low, row.low), some_high = max(some_high, row.high);
    every_low = max(every_low, row.low), every_high = min(every_high, row.high);
    first_segment = min(first_segment, row.segment), last_segment = max(last_segment, row.segment);
  }
  PHI3_DEVICE void merge_lanes() {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      some_low = min(some_low, shuffle_xor(some_low, mask)), some_high = max(some_high, shuffle_xor(some_high, mask));
      every_low = max(every_low, shuffle_xor(every_low, mask));
      every_high = min(every_high, shuffle_xor(every_high, mask));
      first_segment = min(first_segment, shuffle_xor(first_segment, mask));
      last_segment = max(last_segment, shuffle_xor(last_segment, mask));
    }
  }
  PHI3_DEVICE bool some(int position, int segment) const {
    return some_low < position && position <= some_high && first_segment <= segment && segment <= last_segment;
  }
  PHI3_DEVICE bool every(int position) const {
    return every_low < position && position <= every_high && first_segment == last_segment;
  }
};

// Which groups of 64 slots the rows see, a bit each: some of it, and all of it.
PHI3_DEVICE void look(const AttentionOperands& o, int b, const Bounds& bounds, unsigned* some, unsigned* all) {
  const int lane = threadIdx.x % 32, groups = (o.S + kKeys - 1) / kKeys;
  for (int word = threadIdx.x / 32; word * 32 < groups; word += kWarps) {
    unsigned some_here = 0, all_here = 0;
#pragma unroll 8
    for (int bit = 0; bit < 32; ++bit) {
      bool is_seen = false, by_all = true;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = (word * 32 + bit) * kKeys + half * 32 + lane;
        const int position = slot < o.S ? o.k_positions[static_cast<int64>(b) * o.S + slot] : -1;
        const int segment = o.k_segments && slot < o.S ? o.k_segments[static_cast<int64>(b) * o.S + slot] : 0;
        const bool seen = bounds.some(position, segment);
        is_seen |= seen, by_all &= seen && bounds.every(position);
      }
      some_here |= static_cast<unsigned>(ballot(is_seen) != 0) << bit;
      all_here |= static_cast<unsigned>(ballot(by_all) == 0xffffffffu) << bit;
    }
    if (lane == 0) some[word] = some_here, all[word] = all_here;
  }
}

// The first group from `group` on that is seen and belongs to this part of the slots; `groups` if there is none.
PHI3_DEVICE int next_group(const unsigned* some, int group, int groups, int splits, int split) {
  while (group < groups) {
    const unsigned left = some[group / 32] >> group % 32;
    if (!left) {
      group = (group / 32 + 1) * 32;
      continue;
    }
    group += __ffs(static_cast<int>(left)) - 1;
    if (splits == 1 || group % splits == split) return group;
    ++group;
  }
  return groups;
}

template <int H>
PHI3_DEVICE void load_queries(const AttentionOperands& o, int b, int head, int row, unsigned (&q)[H / 16][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row + i % 2 * 8;
    const bool is_there = r < o.T * (o.N / o.K);
    const int64 from = is_there ? place(o, b, head, r) * H + i / 2 * 8 + threadIdx.x % 4 * 2 : 0;
#pragma unroll
    for (int k = 0; k < H / 16; ++k)
      q[k][i] = !is_there     ? 0
                : o.q_is_bf16 ? load4(static_cast<const bf16*>(o.q) + from + 16 * k)
                              : pack_bf16(query(o, from + 16 * k), query(o, from + 16 * k + 1));
  }
}

// scores[n] = q . k of keys 8 n to 8 n + 7.
template <int H>
PHI3_DEVICE void score(const unsigned (&q)[H / 16][4], const bf16* keys, float (&scores)[kTiles][4]) {
  const int lane = threadIdx.x % 32;
  const bf16* const from = keys + (lane % 8 + lane / 16 * 8) * (H + 8) + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = scores[n + 1][i] = 0;
#pragma unroll
    for (int k = 0; k < H / 16; ++k) {
      unsigned part[4];
      load_matrices(part, from + 8 * n * (H + 8) + 16 * k);
      multiply_add(scores[n], q[k], part[0], part[1]);
      multiply_add(scores[n + 1], q[k], part[2], part[3]);
    }
  }
}

// sums += p . v
template <int H>
PHI3_DEVICE void add_values(const float (&p)[kTiles][4], const bf16* values, float (&sums)[H / 8][4]) {
  const int lane = threadIdx.x % 32;
  const bf16* const from = values + lane % 16 * (H + 8) + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kTiles; k += 2) {  // 16 keys
    const unsigned weights[4] = {pack_bf16(p[k][0], p[k][1]), pack_bf16(p[k][2], p[k][3]),
                                 pack_bf16(p[k + 1][0], p[k + 1][1]), pack_bf16(p[k + 1][2], p[k + 1][3])};
#pragma unroll
    for (int n = 0; n < H / 8; n += 2) {
      unsigned part[4];
      load_matrices_transposed(part, from + 8 * k * (H + 8) + 8 * n);
      multiply_add(sums[n], weights, part[0], part[1]);
      multiply_add(sums[n + 1], weights, part[2], part[3]);
    }
  }
}

// Scores -> p = 2^(score - maximum), in place. Elements 0 and 1 belong to the first of a lane's rows, 2 and 3 to the
// second.
template <int H>
PHI3_DEVICE void soften(float (&scores)[kTiles][4], float (&sums)[H / 8][4], float (&most)[2], float (&total)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float now = most[r];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) now = fmaxf(now, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    now = warp_max<4>(now);
    const float decay = fast_exp2(most[r] - now);
    most[r] = now;
    total[r] *= decay;  // of this lane's keys; lanes are added at the end
#pragma unroll
    for (int n = 0; n < H / 8; ++n) sums[n][2 * r] *= decay, sums[n][2 * r + 1] *= decay;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) total[r] += scores[n][i] = fast_exp2(scores[n][i] - now);
  }
}

PHI3_DEVICE void hide(const AttentionOperands& o, int b, int first, int row, float (&scores)[kTiles][4]) {
  const Sight rows[2] = {sight(o, b, row), sight(o, b, row + 8)};
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slot = first + 8 * n + threadIdx.x % 4 * 2 + i;
      const int position = slot < o.S ? o.k_positions[static_cast<int64>(b) * o.S + slot] : -1;
      const int segment = o.k_segments && slot < o.S ? o.k_segments[static_cast<int64>(b) * o.S + slot] : 0;
      if (!rows[0].sees(position, segment)) scores[n][i] = PHI3_NOTHING;
      if (!rows[1].sees(position, segment)) scores[n][2 + i] = PHI3_NOTHING;
    }
}

template <int H>
PHI3_DEVICE void write_rows(const AttentionOperands& o, int b, int head, int row, int split,
                            const float (&sums)[H / 8][4], const float (&most)[2], const float (&total)[2]) {
  const int rows_of_head = o.T * (o.N / o.K), lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float all = warp_sum<4>(total[r]);
    if (row + 8 * r >= rows_of_head) continue;
    const int64 number = (static_cast<int64>(b) * o.K + head) * rows_of_head + row + 8 * r;
    float* const partial = o.partials + (number * o.splits + split) * (H + 2);
    const int64 out = place(o, b, head, row + 8 * r) * H;
    const bool nothing = all == 0 || sight(o, b, row + 8 * r).high < 0;
    if (o.splits > 1 && lane % 4 == 0) partial[H] = most[r], partial[H + 1] = nothing ? 0.f : all;
#pragma unroll
    for (int n = 0; n < H / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int h = 8 * n + lane % 4 * 2 + i;
        if (o.splits > 1)
          partial[h] = sums[n][2 * r + i];
        else
          write_output(o, out + h, nothing ? 0.f : sums[n][2 * r + i] / all);
      }
  }
}

template <class C, int H>
PHI3_DEVICE void attend_block(const AttentionOperands& o) {
  PHI3_DYNAMIC_SHARED(shared);
  const int groups = (o.S + kKeys - 1) / kKeys, words = (groups + 31) / 32;
  bf16* const keys = reinterpret_cast<bf16*>(shared);
  bf16* const values = keys + kKeys * (H + 8);
  float* const k_scales = reinterpret_cast<float*>(values + kKeys * (H + 8));
  float* const v_scales = k_scales + kKeys;
  unsigned* const some = reinterpret_cast<unsigned*>(v_scales + kKeys);
  unsigned* const all = some + words;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.y, b = blockIdx.z;
  const int head = blockIdx.x % o.K;
  const int first_row = (gridDim.x / o.K - 1 - blockIdx.x / o.K) * kBlockRows;  // the last rows see the most keys
  const int64 head_of_cache = ((static_cast<int64>(*o.layer) * o.B + b) * o.K + head) * o.S;
  const C* const k = static_cast<const C*>(o.k) + head_of_cache * o.row_length;
  const C* const v = static_cast<const C*>(o.v) + head_of_cache * o.row_length;

  Bounds bounds;
  for (int row = lane; row < kBlockRows; row += 32) bounds.add(sight(o, b, first_row + row));
  bounds.merge_lanes();
  look(o, b, bounds, some, all);

  const int row = first_row + warp * 16 + lane / 4;
  unsigned q[H / 16][4];
  load_queries<H>(o, b, head, row, q);
  float sums[H / 8][4] = {}, most[2] = {kLowest, kLowest}, total[2] = {};
  __syncthreads();

  Fetched<C, H> fetched;
  const auto is_full = [&](int group) { return all[group / 32] >> group % 32 & 1; };
  const auto ask = [&](const C* from, const float* scales, int group, bf16* tile) {
    const bool full = is_full(group);
    fetched.ask(from, scales, o.row_length, group * kKeys,
                [&](int slot) {
                  if (full) return true;
                  if (slot >= o.S) return false;
                  const int64 at = static_cast<int64>(b) * o.S + slot;
                  return bounds.some(o.k_positions[at], o.k_segments ? o.k_segments[at] : 0);
                },
                tile);
  };
  int group = next_group(some, 0, groups, o.splits, split);
  if (group < groups) ask(k, o.k_scale + head_of_cache, group, keys);
  while (group < groups) {
    fetched.arrive(keys, k_scales);
    __syncthreads();  // keys are there, and all have used the last values
    ask(v, o.v_scale + head_of_cache, group, values);
    float scores[kTiles][4];
    score<H>(q, keys, scores);
    const float factor = 1.4426950408889634f * rsqrtf(H);  // log2(e): p is taken as a power of 2
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[n][i] *= sizeof(C) == 1 ? factor * k_scales[8 * n + lane % 4 * 2 + i % 2] : factor;
    if (!is_full(group)) hide(o, b, group * kKeys, row, scores);
    fetched.arrive(values, v_scales);
    __syncthreads();  // values are there, and all have used the keys
    group = next_group(some, group + 1, groups, o.splits, split);
    if (group < groups) ask(k, o.k_scale + head_of_cache, group, keys);
    soften<H>(scores, sums, most, total);
    if (sizeof(C) == 1) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= v_scales[8 * n + lane % 4 * 2 + i % 2];
    }
    add_values<H>(scores, values, sums);
  }
  write_rows<H>(o, b, head, row, split, sums, most, total);
}

}  // namespace

#define PHI3_BLOCK(type, H) \
  PHI3_KERNEL(kBlockThreads, attend_block_##type##_##H, AttentionOperands o) { attend_block<type, H>(o); }
PHI3_BLOCK(bf16, 64) PHI3_BLOCK(bf16, 96) PHI3_BLOCK(bf16, 128)
PHI3_BLOCK(int8, 64) PHI3_BLOCK(int8, 96) PHI3_BLOCK(int8, 128)

}  // namespace phi3
