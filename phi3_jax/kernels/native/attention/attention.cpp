// Attention of one task: which slots it may see, the softmax over them, and merging the results of several tasks.
#include "attention/attention.h"

#include <algorithm>
#include <cstdint>

#include "attention/attend.h"
#include "attention/rows.h"
#include "attention/vectors.h"

namespace phi3 {

void narrow(AttentionTask& task) {
  const Rows rows(task);
  int64_t begin = task.slot_begin, end = task.slot_end;
  while (begin < end && !candidates(task, rows, begin, std::min<int64_t>(kLanes, end - begin)))
    begin = std::min<int64_t>(begin + kLanes, end);
  while (begin < end && !candidates(task, rows, std::max(begin, end - kLanes), std::min<int64_t>(kLanes, end - begin)))
    end = std::max(begin, end - kLanes);
  task.slot_begin = begin;
  task.slot_end = end;
}

int64_t scratch_bytes(int64_t head_dim) { return 4 * block_scratch(head_dim); }

void attend(const AttentionTask& task, void* scratch, float* partial) {
  const Rows rows(task);
  const int64_t count = rows.count, sums_size = (count + 3) / 4 * 4 * padded(task.head_dim);
  float maxima[kBlockRows], totals[kBlockRows];
  std::fill_n(partial, sums_size, 0.f);
  std::fill_n(maxima, kBlockRows, kLowest);
  std::fill_n(totals, kBlockRows, 0.f);
  const auto attend_these = count <= kFewRows ? attend_few : attend_block;
  attend_these(task, rows, static_cast<float*>(scratch), partial, maxima, totals);
  std::copy_n(maxima, count, partial + sums_size);
  std::copy_n(totals, count, partial + sums_size + count);
}

void finish(const AttentionTask& task, const float* partials, int64_t count) {
  const int64_t rows = task.rows(), length = padded(task.head_dim), sums_size = (rows + 3) / 4 * 4 * length;
  const int64_t size = partial_size(rows, task.head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = task.out + (query(task, r) - task.q);
    const auto maximum_of = [&](int64_t i) { return partials[i * size + sums_size + r]; };
    const auto total_of = [&](int64_t i) { return partials[i * size + sums_size + rows + r]; };
    float most = kLowest, total = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, maximum_of(i));
    const auto weight_of = [&](int64_t i) { return exp2(splat(maximum_of(i) - most))[0]; };
    for (int64_t i = 0; i < count; ++i) total += count == 1 ? total_of(i) : total_of(i) * weight_of(i);
    std::fill_n(out, task.head_dim, 0.f);
    const bool is_padding = task.q_positions[(task.row_begin + r) / task.group] < 0;
    if (is_padding || total == 0) continue;
    for (int64_t i = 0; i < count; ++i) {
      const V weight = splat(count == 1 ? 1 / total : weight_of(i) / total);
      each_vector(partials + i * size + r * length, length, [&](int64_t h, V sum) {
        const int64_t left = std::min<int64_t>(kLanes, task.head_dim - h);
        if (left == kLanes) return store(out + h, fma(sum, weight, load(out + h)));
        for (int64_t j = 0; j < left; ++j) out[h + j] += sum[j] * weight[j];
      });
    }
  }
}

}  // namespace phi3
