// A product y = x . w^T with integers w = (q - zero) scale, or q scale + min: what kernels and their handler share. Or,
// `gated`, y = up silu(gate) with [gate, up] = x . w^T, where w has twice as many rows as y has columns.
#pragma once

namespace phi3 {

struct Product {
  const unsigned char* values;   // [(2) outputs, inputs] of 8 bits, [(2) outputs, inputs / 2] of 4
  const unsigned short* scales;  // float16 [(2) outputs, inputs / group]
  const unsigned short* mins;    // the same, or nullptr
  const unsigned short* x;       // bfloat16 [rows, inputs]
  void* y;                       // float32 or bfloat16 [rows, outputs]
  int rows, outputs, inputs, group_bits;  // 2^group_bits inputs share a scale; `inputs` are whole groups
  int float32;                   // what y is
  int gated;                     // `outputs` are a multiple of 8 then
};

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 16;  // rows of w in a tensor core's product; gated, eight of gate and the eight of up beside them

// linear_few.cu: a block has 16 rows of w, and its warps share the inputs.
namespace few {
constexpr int kStep = 128, kStages = 3;  // inputs that a warp copies at a time, and how many copies are under way
constexpr int row_bytes(int bits) { return kStep * bits / 8; }
constexpr int stride(int bits) { return bits == 4 ? row_bytes(4) + 16 : row_bytes(8) + 32; }  // no bank is asked twice
constexpr int stage_bytes(int bits) { return kTile * stride(bits); }
constexpr int kMost = 99 << 10;  // bytes of shared memory that every card from Ampere on has
inline int scale_bytes(const Product& p) { return kTile * 2 * (p.inputs >> p.group_bits); }
constexpr int sum_bytes(int tiles) { return kWarps * kTile * 8 * tiles * 4; }
}  // namespace few

// linear_many.cu: a block has 128 rows of w and 16 times `tiles` of x; 4 warps share the former, 2 the latter.
namespace many {
constexpr int kWide = 128, kStep = 64, kStages = 3;
constexpr int rows(int tiles) { return 16 * tiles; }
constexpr int row_bytes(int bits) { return kStep * bits / 8; }
constexpr int stride(int bits) { return row_bytes(bits) + (bits == 4 ? 16 : 32); }
constexpr int stage_bytes(int bits, int tiles) { return kWide * stride(bits) + rows(tiles) * kStep * 2; }
}  // namespace many

}  // namespace phi3
