// Attention of a few query rows (decoding): bound by reading keys and values once. Lanes lie along the head.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention/attend.h"
#include "attention/attention.h"
#include "attention/rows.h"
#include "attention/values.h"
#include "attention/vectors.h"

namespace phi3 {
namespace {

// scores[r][key] = q[r] . k[slots[key]] for all keys of a block, rounded up to whole vectors; meanwhile the block's
// values are fetched.
template <class C, int R>
inline void score_keys(const AttentionTask& task, const float* q, const Block& block, float* scores) {
  constexpr int kPerRow = kDots / R >= 16 ? 16 : kDots / R >= 8 ? 8 : kDots / R >= 4 ? 4 : 2;
  constexpr int kVectors = (kPerRow * R + kLanes - 1) / kLanes;
  const C *k = static_cast<const C*>(task.k), *v = static_cast<const C*>(task.v);
  const int64_t head_dim = task.head_dim, length = padded(head_dim), whole = head_dim / kLanes * kLanes;
  for (int64_t begin = 0; begin < block.keys; begin += kPerRow) {
    V dot[kVectors * kLanes] = {};
#pragma GCC unroll 16
    for (int j = 0; j < kPerRow; ++j) {
      const int64_t slot = block.slots[begin + j];
      const C* row = k + slot * task.row_length;
      prefetch(v + slot * task.row_length, head_dim * sizeof(C));
      V sum[R] = {};
      const auto add = [&](int64_t i, V x) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r] = fma(x, load(q + r * length + i), sum[r]);
      };
      for (int64_t i = 0; i < whole; i += kLanes) add(i, load(row + i));
      if (whole < head_dim) add(whole, load_first(row + whole, head_dim - whole));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot[r * kPerRow + j] = sum[r];
    }
    float sums[kVectors * kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(sums + i * kLanes, dots(dot + i * kLanes));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kBlockKeys + begin, sums + r * kPerRow, 4 * kPerRow);
  }
}

// One row's scores of a block -> p = 2^(factors * scores - maximum), in place, with the running maximum and sum.
// Returns what earlier sums have to be multiplied with.
inline float soften(float* scores, const float* factors, int64_t keys, float& maximum_so_far, float& total) {
  for (int64_t j = keys; j % kLanes; ++j) scores[j] = kNothing;
  V most = splat(maximum_so_far);
  for (int64_t j = 0; j < keys; j += kLanes) {
    const V s = load(scores + j) * load(factors + j);
    store(scores + j, s);
    most = maximum(most, s);
  }
  const float now = lanes_max(most);
  V sum = V{};
  for (int64_t j = 0; j < keys; j += kLanes) {
    const V p = exp2(load(scores + j) - splat(now));
    store(scores + j, p);
    sum = sum + p;
  }
  V decay = exp2(splat(maximum_so_far - now));
  const float first = decay[0];
  total = total * first + lanes_sum(sum);
  maximum_so_far = now;
  return first;
}

template <class C, int R>
void attend_rows(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima,
                 float* totals) {
  const int64_t length = padded(task.head_dim);
  float* q = scratch;  // [R, length]
  std::fill_n(q, R * length, 0.f);
  for (int r = 0; r < R; ++r) std::copy_n(query(task, r), task.head_dim, q + r * length);
  float scores[R * kBlockKeys], factors[kBlockKeys], decay[R], value_scales[kBlockKeys];

  each_block(task, rows, [&](const Block& block) {
    const int64_t keys = block.keys;
    score_keys<C, R>(task, q, block, scores);
    std::fill_n(factors, keys, score_factor(task));
    if (task.k_scale)
      for (int64_t j = 0; j < keys; ++j) {
        factors[j] *= task.k_scale[block.slots[j]];
        value_scales[j] = task.v_scale[block.slots[j]];
      }
    std::fill(factors + keys, factors + kBlockKeys, 1.f);
    for (int r = 0; r < R; ++r) {
      float* row = scores + r * kBlockKeys;
      // Hidden keys get the factor 1: their own may be NaN, and -inf * NaN is NaN.
      if (!block.full) {
        float visible[kBlockKeys];
        for (int64_t j = 0; j < keys; ++j) {
          const bool hidden = block.masked(task, rows, r, j);
          visible[j] = hidden ? 1.f : factors[j];
          row[j] = hidden ? kNothing : row[j];
        }
        std::fill(visible + keys, visible + kBlockKeys, 1.f);
        decay[r] = soften(row, visible, keys, maxima[r], totals[r]);
      } else {
        decay[r] = soften(row, factors, keys, maxima[r], totals[r]);
      }
      if (task.v_scale)
        for (int64_t j = 0; j < keys; ++j) row[j] *= value_scales[j];
    }
    if (block.full) return add_all_values<C, R>(task, block.slots, keys, scores, decay, sums, block);
    for (int r = 0; r < R; ++r) {
      const float* row = scores + r * kBlockKeys;
      add_visible_values<C>(task, rows, block, r, row, decay[r], sums + r * length);
    }
  });
}

template <class C>
void attend_as(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima, float* totals) {
  if (rows.count == 1) return attend_rows<C, 1>(task, rows, scratch, sums, maxima, totals);
  if (rows.count == 2) return attend_rows<C, 2>(task, rows, scratch, sums, maxima, totals);
  if (rows.count == 3) return attend_rows<C, 3>(task, rows, scratch, sums, maxima, totals);
  attend_rows<C, 4>(task, rows, scratch, sums, maxima, totals);
}

}  // namespace

void attend_few(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima,
                float* totals) {
  const auto attend = task.type == CacheType::kFloat32    ? attend_as<float>
                      : task.type == CacheType::kBfloat16 ? attend_as<uint16_t>
                                                          : attend_as<int8_t>;
  attend(task, rows, scratch, sums, maxima, totals);
}

}  // namespace phi3
