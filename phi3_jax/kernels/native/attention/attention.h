// Attention over the key-value cache, and writing to it.
//
// Axis letters: L layer, B batch, T query, S key (a slot of the cache), N query heads, K key-value heads, G = N/K query
// heads that share a key-value head, H head dim of the cache (its last axis), head_dim (<= H) the part of it that is
// used.
#pragma once
#include <cstdint>

namespace phi3 {

enum class CacheType { kFloat32, kBfloat16, kInt8 };

inline int64_t bytes(CacheType type) { return type == CacheType::kFloat32 ? 4 : type == CacheType::kBfloat16 ? 2 : 1; }

// At most this many query rows make a task.
constexpr int64_t kBlockRows = 64;

// One batch row, one key-value head, some of its query rows and some of its slots. Query row r is head r % group of
// token r / group.
//
// Slot s is visible to a query iff 0 <= k_position <= q_position, k_position > q_position - window (if window > 0), and
// their segments are equal (if there are any). What lies in a slot that a query does not see, NaN too, never reaches
// it.
struct AttentionTask {
  const float* q;  // token t, head g at q + t * token_stride + g * head_dim
  float* out;      // the same layout
  int64_t token_stride, group, head_dim;
  int64_t row_begin, row_end;  // at most kBlockRows

  CacheType type;
  const void *k, *v;               // [S, H] of this head
  const float *k_scale, *v_scale;  // [S] of this head if int8, else nullptr
  int64_t row_length;              // H
  int64_t slot_begin, slot_end;

  const int32_t *q_positions, *q_segments;  // by token, -1 is padding; segments may be nullptr, both or none
  const int32_t *k_positions, *k_segments;  // by slot, -1 is an empty one
  int64_t window;                           // 0 = none

  int64_t rows() const { return row_end - row_begin; }
};

// Sums are kept in rows of this many floats, so that whole vectors may be read and written.
inline int64_t padded(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Floats of a partial result: sums of p * v [rows rounded up to 4, padded(head_dim)], then the rows' maxima, then their
// sums of p.
inline int64_t partial_size(int64_t rows, int64_t head_dim) { return (rows + 3) / 4 * 4 * padded(head_dim) + 2 * rows; }

// Shrinks [slot_begin, slot_end) to the smallest range that holds every slot which some query of the task may see.
void narrow(AttentionTask& task);

// Room that `attend` needs, in bytes; any alignment of a float will do, 64 is best.
int64_t scratch_bytes(int64_t head_dim);

// Softmax attention of the task's rows over its slots, not yet divided by the sum of p: all of `partial` is written.
void attend(const AttentionTask& task, void* scratch, float* partial);

// Merges `count` partial results of the same rows, one behind the other, over different slots, and writes `out`.
// A query that saw no key gives zeros.
void finish(const AttentionTask& task, const float* partials, int64_t count);

// Writes one token's head_dim floats to a row of the cache, the rest of the row_length as zeros. Only int8 sets
// *scale.
void store_row(CacheType type, const float* x, int64_t head_dim, int64_t row_length, void* row, float* scale);

}  // namespace phi3
