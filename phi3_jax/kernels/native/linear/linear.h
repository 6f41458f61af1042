// y = x W^T for weights in panels: a run of neighbouring outputs lies in the lanes of the vectors, and the inputs
// follow one another, so that one panel is one sequential stream of memory and no sum crosses lanes.
//
// One layer of O outputs and I inputs (J = I rounded up to whole groups of 32, 64 or 128):
//   bf16    uint16 [ceil(O/64), ceil(I/2), 64 outputs, 2 inputs]
//   8 bits  uint8  [ceil(O/32), J/4, 32 outputs, 4 inputs], q in 1..255
//   4 bits  uint8  [ceil(O/32), J/8, 32 outputs, 4 bytes]: byte b of step s: inputs 8s+b (low half), 8s+4+b (high)
//   scales, mins   float16 [ceil(O/32), J/group, 32 outputs]
// weight = (q - 128) * scale or (q - 8) * scale, and q * scale + min where there are mins.
#pragma once
#include <cstdint>

namespace phi3 {

constexpr int64_t kBf16Panel = 64;       // outputs
constexpr int64_t kQuantizedPanel = 32;  // outputs
constexpr int64_t kMaxGroup = 128;       // inputs that share a scale

// Rows of x as integers: x = q * scale, one scale for each row and group. Inputs from I to J are zeros.
struct QuantizedRows {
  int8_t* q;        // [rows, stride], of which groups * group are used, -127..127
  float* scales;    // [rows, groups]; NaN where the group holds a NaN or an infinity
  float* sums;      // [rows, groups]: the sum of q
  int32_t* starts;  // [rows, groups]: what integer sums start with, minus q times the zero point of the weights
  int64_t stride;
  int64_t groups;
  int64_t group;
};

struct QuantizedWeights {
  const uint8_t* data;
  const uint16_t* scales;
  const uint16_t* mins;  // nullptr: symmetric
  int bits;
};

// Size of one rounded input: 2 where the processor multiplies bf16, 4 where it multiplies float32.
extern const int64_t kRoundedBytes;

// One row [k], rounded to bf16 (nearest even), to [k rounded up to even].
void round_row(const float* x, int64_t k, void* rounded);

// One panel: y[i, 0..63] for `rows` rounded rows of 2 * pairs inputs. Rows are x_stride inputs and y_stride floats
// apart.
void bf16_panel(const void* x, int64_t x_stride, int64_t rows, int64_t pairs, const uint16_t* panel, float* y,
                int64_t y_stride);

// Row `row` of x [k] into `rows`, for weights of this kind.
void quantize_row(const float* x, int64_t k, int bits, bool has_mins, const QuantizedRows& rows, int64_t row);

// One panel: y[i, 0..31] for rows [first_row, first_row + count); `panel` is this panel's data, scales and mins.
void quantized_panel(const QuantizedRows& rows, int64_t first_row, int64_t count, const QuantizedWeights& panel,
                     float* y, int64_t stride);

}  // namespace phi3
