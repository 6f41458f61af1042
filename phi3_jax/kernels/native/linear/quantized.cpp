// y = x W^T for weights as integers of 8 or 4 bits.
#include <algorithm>

#include "linear/fetch.h"
#include "linear/linear.h"
#include "linear/tiles.h"
#include "linear/unroll.h"
#include "linear/vectors.h"

namespace phi3 {
namespace {

constexpr int64_t kChunk = 512;  // inputs, 16 KB or 8 KB of weights: they stay in L1 while all rows pass
constexpr int64_t kOnePass = 2;  // rows

template <int kRows, int kVectors, int kBits, bool kOnlyPass>
void quantized_tile(const QuantizedRows& rows, int64_t row, int64_t first, int64_t last, const QuantizedWeights& panel,
                    int column, uintptr_t ahead, float* y, int64_t stride) {
  const int64_t groups = rows.groups, group = rows.group;
  const int8_t* q = rows.q + row * rows.stride + first * group;
  const uint8_t* w = panel.data + first * group * 4 * kBits + column * 4;
  V::Floats sums[kRows][kVectors];
  PHI3_EACH (r, kRows)
    PHI3_EACH (v, kVectors) sums[r][v] = first > 0 ? V::load(y + r * stride + v * V::kLanes) : V::zero();
  for (int64_t g = first; g < last; ++g) {
    const int64_t at = row * groups + g, scale = g * kQuantizedPanel + column;
    V::Ints dots[kRows][kVectors];
    PHI3_EACH (r, kRows)
      PHI3_EACH (v, kVectors) dots[r][v] = V::set_ints(rows.starts[at + r * groups]);
    for (int64_t k = 0; k < group; k += 32) {
      V::template dot32<kRows, kVectors, kBits, kOnlyPass>(dots, w, q, rows.stride, ahead);
      w += 128 * kBits;
      q += 32;
      ahead += (kOnlyPass ? 128 : 64) * kBits;
    }
    if (kOnlyPass) fetch_now(address(panel.scales + scale) + 1024);
    if (kOnlyPass && panel.mins) fetch_now(address(panel.mins + scale) + 1024);
    PHI3_EACH (v, kVectors) {
      const V::Floats scales = V::halves(panel.scales + scale + v * V::kLanes);
      const V::Floats mins = panel.mins ? V::halves(panel.mins + scale + v * V::kLanes) : V::zero();
      // The small factors first: scale * dot cannot overflow, however large x is.
      PHI3_EACH (r, kRows) {
        V::Floats part = V::product(scales, V::to_floats(dots[r][v]));
        if (panel.mins) part = V::add_product(part, mins, V::set(rows.sums[at + r * groups]));
        sums[r][v] = V::add_product(sums[r][v], part, V::set(rows.scales[at + r * groups]));
      }
    }
  }
  PHI3_EACH (r, kRows)
    PHI3_EACH (v, kVectors) V::store(y + r * stride + v * V::kLanes, sums[r][v]);
}

template <int kMost, int kBits, bool kOnlyPass>
void quantized_tiles(int64_t count, const QuantizedRows& rows, int64_t row, int64_t first, int64_t last,
                     const QuantizedWeights& panel, uintptr_t ahead, float* y, int64_t stride) {
  if constexpr (kMost > 1)
    if (count < kMost)
      return quantized_tiles<kMost - 1, kBits, kOnlyPass>(count, rows, row, first, last, panel, ahead, y, stride);
  constexpr int kVectors = V::quantized_vectors(kMost), kWidth = kVectors * V::kLanes;
  for (int column = 0; column < kQuantizedPanel; column += kWidth) {
    const uintptr_t here = kOnlyPass || column == 0 ? ahead : ahead + (last - first) * rows.group * 2 * kBits;
    quantized_tile<kMost, kVectors, kBits, kOnlyPass>(rows, row, first, last, panel, column, here, y + column, stride);
  }
}

template <int kBits>
void quantized_panel_of(const QuantizedRows& rows, int64_t row, int64_t count, const QuantizedWeights& panel, float* y,
                        int64_t stride) {
  const int64_t tiles = tiles_of(count, V::kQuantizedRows, kOnePass), groups = rows.groups;
  if (tiles == 1 && V::quantized_vectors(count) * V::kLanes == kQuantizedPanel)
    return quantized_tiles<V::kQuantizedRows, kBits, true>(count, rows, row, 0, groups, panel,
                                                           address(panel.data) + fetch_distance(kBits), y, stride);
  const int64_t step = kChunk / rows.group;
  for (int64_t g = 0; g < groups; g += step) {
    const int64_t last = std::min<int64_t>(g + step, groups), bytes = (last - g) * rows.group * 4 * kBits;
    for (int64_t t = 0, r = 0; t < tiles; ++t) {
      const int64_t some = divide_up(count - r, tiles - t);
      const uintptr_t ahead = address(panel.data) + last * rows.group * 4 * kBits + (t % 2) * (bytes / 2);
      quantized_tiles<V::kQuantizedRows, kBits, false>(some, rows, row + r, g, last, panel, ahead, y + r * stride,
                                                       stride);
      r += some;
    }
  }
}

}  // namespace

void quantized_panel(const QuantizedRows& rows, int64_t row, int64_t count, const QuantizedWeights& panel, float* y,
                     int64_t stride) {
  if (panel.bits == 8)
    quantized_panel_of<8>(rows, row, count, panel, y, stride);
  else
    quantized_panel_of<4>(rows, row, count, panel, y, stride);
}

}  // namespace phi3
