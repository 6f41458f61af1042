// A run of panels, for a block of rows: what one thread does at a time, for the handlers and for the test.
#pragma once
#include <cstdint>
#include <cstring>

#include "linear/linear.h"

namespace phi3 {

// How far apart to lay rows of so many bytes: whole cache lines, and an odd number of them. Rows that are a power of
// two apart would all compete for the same few places of the caches.
inline int64_t row_stride(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// Calls panel(to, stride of its rows) and sees to it that y gets what it writes. The last panel, which may be wider
// than the rest of y, goes to `edge` [rows, width] first, and so do many rows: the kernel reads and writes their sums
// often, and rows of y may lie a power of two apart.
template <class Panel>
void write_panel(int64_t width, int64_t left, int64_t rows, int64_t stride, float* y, float* edge, const Panel& panel) {
  constexpr int64_t kFewRows = 8;
  if (left >= width && rows <= kFewRows) return panel(y, stride);
  panel(edge, width);
  const size_t bytes = (left < width ? left : width) * sizeof(float);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(y + r * stride, edge + r * width, bytes);
}

struct Bf16Matrix {
  const uint16_t* panels;  // one layer
  int64_t outputs, inputs;

  int64_t pairs() const { return (inputs + 1) / 2; }
  int64_t x_stride() const {  // of the rounded rows
    return row_stride(2 * pairs() * kRoundedBytes) / kRoundedBytes;
  }
  int64_t count() const { return (outputs + kBf16Panel - 1) / kBf16Panel; }
};

// y[r, outputs of panels first .. last - 1] for rows r first_row .. last_row - 1 of `rounded` and y [rows, outputs];
// `edge` has room for (last_row - first_row) * kBf16Panel floats.
inline void bf16_panels(const Bf16Matrix& matrix, const void* rounded, int64_t first_row, int64_t last_row,
                        int64_t first, int64_t last, float* edge, float* y) {
  const int64_t rows = last_row - first_row, pairs = matrix.pairs(), x_stride = matrix.x_stride();
  const char* x = static_cast<const char*>(rounded) + first_row * x_stride * kRoundedBytes;
  for (int64_t p = first; p < last; ++p) {
    float* corner = y + first_row * matrix.outputs + p * kBf16Panel;
    write_panel(kBf16Panel, matrix.outputs - p * kBf16Panel, rows, matrix.outputs, corner, edge,
                [&](float* to, int64_t stride) {
                  bf16_panel(x, x_stride, rows, pairs, matrix.panels + p * pairs * 2 * kBf16Panel, to, stride);
                });
  }
}

struct QuantizedMatrix {
  QuantizedWeights layer;  // the first panel of one layer
  int64_t outputs, inputs, group;

  int64_t groups() const { return (inputs + group - 1) / group; }
  int64_t x_stride() const { return row_stride(groups() * group); }  // of the rows as integers
  int64_t count() const { return (outputs + kQuantizedPanel - 1) / kQuantizedPanel; }
  int64_t panel_bytes() const { return groups() * group * kQuantizedPanel * layer.bits / 8; }
};

// The same for integers; `edge` has room for (last_row - first_row) * kQuantizedPanel floats.
inline void quantized_panels(const QuantizedMatrix& matrix, const QuantizedRows& x, int64_t first_row, int64_t last_row,
                             int64_t first, int64_t last, float* edge, float* y) {
  const int64_t rows = last_row - first_row, scales = matrix.groups() * kQuantizedPanel;
  for (int64_t p = first; p < last; ++p) {
    QuantizedWeights panel = matrix.layer;
    panel.data += p * matrix.panel_bytes();
    panel.scales += p * scales;
    if (panel.mins) panel.mins += p * scales;
    float* corner = y + first_row * matrix.outputs + p * kQuantizedPanel;
    write_panel(kQuantizedPanel, matrix.outputs - p * kQuantizedPanel, rows, matrix.outputs, corner, edge,
                [&](float* to, int64_t stride) { quantized_panel(x, first_row, rows, panel, to, stride); });
  }
}

}  // namespace phi3
