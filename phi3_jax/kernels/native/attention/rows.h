// Who sees what: from positions, window and segments of a task to blocks of slots that are worth reading.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/attention.h"
#include "attention/vectors.h"

namespace phi3 {

constexpr int kBlockKeys = 64;
constexpr int kScan = 1024;  // slots that are looked up ahead
constexpr float kNothing = -std::numeric_limits<float>::infinity();
// Where maxima start: finite, so that -inf minus a maximum is -inf.
constexpr float kLowest = std::numeric_limits<float>::lowest();

// What scores are multiplied with: the usual 1/sqrt(head_dim), and log2(e) because p is taken as a power of 2.
inline float score_factor(const AttentionTask& task) {
  return static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(task.head_dim)));
}

inline const float* query(const AttentionTask& task, int64_t r) {
  const int64_t token = (task.row_begin + r) / task.group, head = (task.row_begin + r) % task.group;
  return task.q + token * task.token_stride + head * task.head_dim;
}

// What the query rows of a task may see. A row sees position p iff low < p <= high; padding has high = -1.
struct Rows {
  int64_t count, padded_count;  // padded to whole vectors and to 4
  int32_t low[kBlockRows], high[kBlockRows], segment[kBlockRows];
  // Slots out of (some_low, some_high] are seen by nobody, those in (every_low, every_high] by all, padding aside, if
  // there is only one segment.
  int32_t some_low = INT32_MAX, some_high = -1, every_low = -1, every_high = INT32_MAX;
  int32_t first_segment = INT32_MAX, last_segment = INT32_MIN;

  explicit Rows(const AttentionTask& task) {
    constexpr int64_t kMultiple = kLanes < 4 ? 4 : kLanes;
    count = task.rows();
    padded_count = (count + kMultiple - 1) / kMultiple * kMultiple;
    for (int64_t r = 0; r < padded_count; ++r) {
      const int64_t token = (task.row_begin + r) / task.group;
      high[r] = r < count ? std::max(task.q_positions[token], -1) : -1;
      const bool unlimited = task.window <= 0 || task.window > high[r];
      low[r] = unlimited ? -1 : static_cast<int32_t>(high[r] - task.window);
      segment[r] = r < count && task.q_segments ? task.q_segments[token] : 0;
      if (high[r] < 0) continue;
      some_low = std::min(some_low, low[r]);
      some_high = std::max(some_high, high[r]);
      every_low = std::max(every_low, low[r]);
      every_high = std::min(every_high, high[r]);
      first_segment = std::min(first_segment, segment[r]);
      last_segment = std::max(last_segment, segment[r]);
    }
  }

  bool sees(int64_t r, int32_t position, int32_t of_segment) const {
    return low[r] < position && position <= high[r] && segment[r] == of_segment;
  }
  bool one_segment() const { return first_segment == last_segment; }
};

inline int32_t segment_of(const AttentionTask& task, int64_t slot) {
  return task.k_segments ? task.k_segments[slot] : 0;
}

// The slots from `slot` on that some row may see, one bit each; `n` is kLanes or, at the end, less.
inline unsigned candidates(const AttentionTask& task, const Rows& rows, int64_t slot, int64_t n) {
  int32_t positions[kLanes], segments[kLanes];
  const int32_t* where = task.k_positions + slot;
  const int32_t* which = task.k_segments ? task.k_segments + slot : nullptr;
  if (n < kLanes) {
    std::fill_n(std::copy_n(where, n, positions), kLanes - n, -1);
    where = positions;
    if (which) std::fill_n(std::copy_n(which, n, segments), kLanes - n, 0);
    if (which) which = segments;
  }
  const I position = load_int(where);
  I seen = (position > splat(rows.some_low)) & (position <= splat(rows.some_high));
  if (which) {
    const I segment = load_int(which);
    seen &= (segment >= splat(rows.first_segment)) & (segment <= splat(rows.last_segment));
  }
  return bits(seen);
}

// Up to kBlockKeys slots that some row may see. The list is filled up with repetitions to a multiple of kDots.
struct Block {
  const int32_t* slots;
  int64_t keys;
  const int32_t* next_slots;  // what is read afterwards, as far as it is known
  int64_t next_keys;
  bool full;  // all rows see all of it

  bool masked(const AttentionTask& task, const Rows& rows, int64_t r, int64_t key) const {
    return !full && !rows.sees(r, task.k_positions[slots[key]], segment_of(task, slots[key]));
  }
};

inline bool is_full(const AttentionTask& task, const Rows& rows, const int32_t* slots, int64_t keys) {
  if (!rows.one_segment()) return false;
  if (rows.some_low == rows.every_low && rows.some_high == rows.every_high) return true;
  bool full = true;
  for (int64_t j = 0; j < keys; ++j) {
    const int32_t position = task.k_positions[slots[j]];
    full &= position > rows.every_low && position <= rows.every_high;
  }
  return full;
}

// Calls f(block) for all slots of the task that some row may see. Not inlined, because GCC 12 then makes slower loops
// of what f does: 10% for two rows.
template <class F>
__attribute__((noinline)) void each_block(const AttentionTask& task, const Rows& rows, const F& f) {
  int32_t slots[kScan + 2 * kBlockKeys];
  int64_t slot = task.slot_begin;
  while (slot < task.slot_end) {
    int64_t found = 0;
    for (; slot < task.slot_end && found < kScan; slot += kLanes) {
      const unsigned seen = candidates(task, rows, slot, std::min<int64_t>(kLanes, task.slot_end - slot));
      if (seen) found += append(slots + found, static_cast<int32_t>(slot), seen);
    }
    if (found == 0) return;
    std::fill_n(slots + found, kBlockKeys, slots[found - 1]);
    for (int64_t begin = 0; begin < found; begin += kBlockKeys) {
      const int64_t keys = std::min<int64_t>(kBlockKeys, found - begin), next = begin + keys;
      const int64_t next_keys = std::min<int64_t>(kBlockKeys, found - next);
      f(Block{slots + begin, keys, slots + next, next_keys, is_full(task, rows, slots + begin, keys)});
    }
  }
}

}  // namespace phi3
