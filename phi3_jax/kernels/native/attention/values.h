// Sums over values where they lie in the cache, weighted with p.
#pragma once
#include <cstdint>
#include <type_traits>

#include "attention/attention.h"
#include "attention/rows.h"
#include "attention/vectors.h"

namespace phi3 {

// The keys of the next block, which are fetched while the values of this one are added.
template <class C>
struct Ahead {
  const C* rows;
  const int32_t* slots;
  int64_t keys, bytes;
};

// sums[r] = sums[r] * decay[r] + sum over keys of p[r][key] * v[slots[key]], for R rows and NV vectors of the head; if
// kPart, NV is 1 and only the first `last` elements are there.
template <class C, int R, int NV, bool kPart>
__attribute__((noinline)) void add_values(const C* v, int64_t row_length, const int32_t* slots, int64_t keys,
                                          const float* p, const float* decay, float* sums, int64_t sums_length,
                                          int64_t last, const Ahead<C>& ahead) {
  V sum[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) sum[r][i] = load(sums + r * sums_length + i * kLanes) * splat(decay[r]);
  for (int64_t key = 0; key < keys; ++key) {
    const C* row = v + slots[key] * row_length;
    if (key < ahead.keys) prefetch(ahead.rows + ahead.slots[key] * row_length, ahead.bytes);
    V x[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) x[i] = kPart ? load_first(row, last) : load(row + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) sum[r][i] = fma(splat(p[r * kBlockKeys + key]), x[i], sum[r][i]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) store(sums + r * sums_length + i * kLanes, sum[r][i]);
}

// The same for the whole head, in passes of 6, 4, 2 or 1 vectors: few widths, because each is compiled separately.
template <class C, int R>
inline void add_all_values(const AttentionTask& task, const int32_t* slots, int64_t keys, const float* p,
                           const float* decay, float* sums, const Block& block) {
  const C* v = static_cast<const C*>(task.v);
  const int64_t length = padded(task.head_dim), bytes = task.head_dim * sizeof(C);
  Ahead<C> ahead = {static_cast<const C*>(task.k), block.next_slots, block.next_keys, bytes};
  int64_t begin = 0;
  const auto pass = [&](auto width, auto part) {
    constexpr int NV = decltype(width)::value;
    if constexpr (NV == 1 || NV * R <= kSums)
      while (task.head_dim - begin >= (part ? 1 : NV * kLanes)) {
        add_values<C, R, NV, decltype(part)::value>(v + begin, task.row_length, slots, keys, p, decay, sums + begin,
                                                    length, task.head_dim - begin, ahead);
        begin += NV * kLanes;
        ahead.keys = 0;
      }
  };
  constexpr std::false_type whole{};
  if (task.head_dim != 8 * kLanes) pass(std::integral_constant<int, 6>(), whole);  // 8 are 4 + 4, not 6 + 2
  pass(std::integral_constant<int, 4>(), whole);
  pass(std::integral_constant<int, 2>(), whole);
  pass(std::integral_constant<int, 1>(), whole);
  pass(std::integral_constant<int, 1>(), std::true_type());
}

// The same for one row and only the keys that it sees: p is 0 where it does not, but 0 * NaN would be NaN.
template <class C>
inline void add_visible_values(const AttentionTask& task, const Rows& rows, const Block& block, int64_t r,
                               const float* p, float decay, float* sums) {
  int32_t slots[kBlockKeys];
  float visible[kBlockKeys];
  int64_t keys = 0;
  for (int64_t j = 0; j < block.keys; ++j) {
    if (block.masked(task, rows, r, j)) continue;
    slots[keys] = block.slots[j];
    visible[keys++] = p[j];
  }
  add_all_values<C, 1>(task, slots, keys, visible, &decay, sums, Block{nullptr, 0, nullptr, 0, true});
}

}  // namespace phi3
