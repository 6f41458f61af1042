// A product y = x . w^T with integers w = (q - zero) scale, or q scale + min: what kernels and their handler share.
#pragma once

namespace phi3 {

struct Product {
  const unsigned char* values;   // [outputs, inputs] of 8 bits, [outputs, inputs / 2] of 4
  const unsigned short* scales;  // float16 [outputs, inputs / group]
  const unsigned short* mins;    // the same, or nullptr
  const unsigned short* x;       // bfloat16 [rows, inputs]
  void* y;                       // float32 or bfloat16 [rows, outputs]
  int rows, outputs, inputs, group_bits;  // 2^group_bits inputs share a scale; `inputs` are whole groups
  int float32;                   // what y is
};

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 16;  // outputs of a tensor core's product

// linear_few.cu: a block has 16 outputs, and its warps share the inputs.
namespace few {
constexpr int kStep = 128, kStages = 3;  // inputs that a warp copies at a time, and how many copies are under way
constexpr int row_bytes(int bits) { return kStep * bits / 8; }
constexpr int stride(int bits) { return bits == 4 ? row_bytes(4) + 16 : row_bytes(8) + 32; }  // no bank is asked twice
constexpr int stage_bytes(int bits) { return kTile * stride(bits); }
inline int scale_bytes(const Product& p) { return kTile * 2 * (p.inputs >> p.group_bits); }
constexpr int sum_bytes(int tiles) { return kWarps * kTile * 8 * tiles * 4; }
}  // namespace few

// linear_many.cu: a block has 128 outputs and 16 times `tiles` rows; 4 warps share the outputs, 2 the rows.
namespace many {
constexpr int kOutputs = 128, kStep = 64, kStages = 3;
constexpr int rows(int tiles) { return 16 * tiles; }
constexpr int row_bytes(int bits) { return kStep * bits / 8; }
constexpr int stride(int bits) { return row_bytes(bits) + (bits == 4 ? 16 : 32); }
constexpr int stage_bytes(int bits, int tiles) { return kOutputs * stride(bits) + rows(tiles) * kStep * 2; }
}  // namespace many

}  // namespace phi3
