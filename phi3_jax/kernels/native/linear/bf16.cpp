// y = x W^T for weights in bfloat16.
#include <algorithm>

#include "linear/fetch.h"
#include "linear/linear.h"
#include "linear/tiles.h"
#include "linear/unroll.h"
#include "linear/vectors.h"

namespace phi3 {
namespace {

constexpr int64_t kPairBytes = 256;  // of weights: one pair of inputs of a panel
constexpr int64_t kChunk = 64;       // pairs of inputs, 16 KB of weights: they stay in L1 while all rows pass
constexpr int64_t kOnePass = 4;      // rows

// kRows x (kVectors * kLanes outputs) of y, for some pairs of inputs; `more` adds to y. kOnlyPass: see fetch_step.
template <int kRows, int kVectors, bool kOnlyPass>
void bf16_tile(const V::Rounded* x, int64_t x_stride, const uint16_t* w, int64_t pairs, uintptr_t ahead, float* y,
               int64_t y_stride, bool more) {
  V::Floats sums[kRows][kVectors];
  PHI3_EACH (r, kRows)
    PHI3_EACH (v, kVectors) sums[r][v] = more ? V::load(y + r * y_stride + v * V::kLanes) : V::zero();
  for (int64_t k = 0; k < pairs; ++k) {
    fetch_step<16, kOnlyPass>(ahead, 2 * k);
    fetch_step<16, kOnlyPass>(ahead, 2 * k + 1);
    V::Weights weights[kVectors];
    PHI3_EACH (v, kVectors) weights[v] = V::weights(w + k * 128 + v * V::kLanes * 2);
    PHI3_EACH (r, kRows) {
      const V::Inputs inputs = V::inputs(x + r * x_stride + 2 * k);
      PHI3_EACH (v, kVectors) sums[r][v] = V::dot2(sums[r][v], weights[v], inputs);
    }
  }
  PHI3_EACH (r, kRows)
    PHI3_EACH (v, kVectors) V::store(y + r * y_stride + v * V::kLanes, sums[r][v]);
}

// The whole width of the panel, for 1 to kMost rows.
template <int kMost, bool kOnlyPass>
void bf16_tiles(int64_t rows, const V::Rounded* x, int64_t x_stride, const uint16_t* w, int64_t pairs, uintptr_t ahead,
                float* y, int64_t y_stride, bool more) {
  if constexpr (kMost > 1)
    if (rows < kMost) return bf16_tiles<kMost - 1, kOnlyPass>(rows, x, x_stride, w, pairs, ahead, y, y_stride, more);
  constexpr int kVectors = V::bf16_vectors(kMost), kWidth = kVectors * V::kLanes;
  for (int column = 0; column < kBf16Panel; column += kWidth) {
    const uintptr_t here = kOnlyPass || column == 0 ? ahead : ahead + pairs * kPairBytes / 2;
    bf16_tile<kMost, kVectors, kOnlyPass>(x, x_stride, w + column * 2, pairs, here, y + column, y_stride, more);
  }
}

}  // namespace

const int64_t kRoundedBytes = sizeof(V::Rounded);

void round_row(const float* x, int64_t k, void* rounded) { V::round_row(x, k, static_cast<V::Rounded*>(rounded)); }

void bf16_panel(const void* rounded, int64_t x_stride, int64_t rows, int64_t pairs, const uint16_t* w, float* y,
                int64_t y_stride) {
  const V::Rounded* x = static_cast<const V::Rounded*>(rounded);
  const int64_t tiles = tiles_of(rows, V::kBf16Rows, kOnePass);
  if (tiles == 1 && V::bf16_vectors(rows) * V::kLanes == kBf16Panel)
    return bf16_tiles<V::kBf16Rows, true>(rows, x, x_stride, w, pairs, address(w) + fetch_distance(16), y, y_stride,
                                          false);
  for (int64_t k = 0; k < pairs; k += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, pairs - k), half = count * kPairBytes / 2;
    for (int64_t t = 0, r = 0; t < tiles; ++t) {
      const int64_t some = divide_up(rows - r, tiles - t);
      const uintptr_t ahead = address(w + k * 128) + count * kPairBytes + (t % 2) * half;
      bf16_tiles<V::kBf16Rows, false>(some, x + r * x_stride + 2 * k, x_stride, w + k * 128, count, ahead,
                                      y + r * y_stride, y_stride, k > 0);
      r += some;
    }
  }
}

}  // namespace phi3
