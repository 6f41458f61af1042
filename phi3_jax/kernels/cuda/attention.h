// Operands of the attention kernels: the host fills them in (attention_ffi.cpp), kernels get them by value.
//
// Axis letters: L layer, B batch, T query, S key (a slot of the cache), N query heads, K key-value heads, G = N/K query
// heads that share a key-value head, H head dim. Query row r of a key-value head is head r % G of token r / G.
//
// Slot s is visible to a query iff 0 <= k_position <= q_position, k_position > q_position - window (if window > 0), and
// their segments are equal (if there are any).
#pragma once

namespace phi3 {

struct AttentionOperands {
  const void* q;  // [B, T, N, H], as the output
  void* out;
  const void *k, *v;               // [L, B, K, S, row_length]
  const float *k_scale, *v_scale;  // [L, B, K, S], for int8
  const int *q_positions, *k_positions;  // [B, T], [B, S]; -1 is padding, or an empty slot
  const int *q_segments, *k_segments;    // the same shapes, or both nullptr
  const int* layer;
  float* partials;  // [B * K * T * G, splits, H + 2]: sums of p * v, the largest score, the sum of p; if splits > 1
  int B, T, N, K, S, row_length, window, splits, q_is_bf16;
};

constexpr int kFewThreads = 128;
constexpr int kFewKeys = 32;  // a warp looks at so many slots at once
constexpr int kFewRows = 8;    // more of them go to tensor cores, unless the cache is float32
constexpr int kMergeThreads = 128;

constexpr int kBlockThreads = 128;
constexpr int kBlockRows = 64;  // query rows of a block
constexpr int kBlockKeys = 64;
#define PHI3_BLOCK_SHARED(H, S) /* bytes: keys, values, their scales, and two bits for each group of keys */ \
  (2 * kBlockKeys * ((H) + 8) * 2 + 2 * kBlockKeys * 4 + 2 * (((S) + 32 * kBlockKeys - 1) / (32 * kBlockKeys)) * 4)

// Storing new keys and values, and rotating them and the queries before, if there are cos and sin.
struct WriteOperands {
  void *k, *v;                             // [L, B, K, S, row_length]
  float *k_scale, *v_scale;                // [L, B, K, S], for int8
  const void *new_q, *new_k, *new_v;       // the heads of a token, [H] each; the next token is token_stride further on
  void* q;                                 // [B, T, N, H], rotated
  const void *cos, *sin;                   // [B, T, R], of the same type as what is new
  const int* positions;                    // [B, T]
  const int* layer;
  int B, T, N, K, S, H, R, row_length, token_stride, new_is_bf16;  // N = 0 if queries are left alone
};

constexpr int kWriteThreads = 256;
constexpr int kLargestHead = 128;

}  // namespace phi3
