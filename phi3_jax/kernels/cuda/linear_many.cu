// The product for many rows, which takes the time of its multiplications (linear_few.cu says how integers are multiplied).
//
// A block's next integers and numbers of x are on their way into shared memory while it multiplies others. A warp has 32 rows
// of them and half of the block's rows of x.
#include "integers.h"

namespace phi3 {
namespace many {

// Where the 16 bytes `chunk` of a row of x are in shared memory: 8 lanes that read together ask every bank once.
PHI3_DEVICE int place_of_x(int row, int chunk) { return row * kStep * 2 + (chunk ^ (row & 1) << 2) * 16; }

// What a thread copies of each step: 16 bytes of some rows of the weights and of x. Beyond the last row it is read again,
// and nobody stores what becomes of it.
template <int bits, int tiles>
struct Copier {
  static constexpr int chunks = row_bytes(bits) / 16, copies = kWide * chunks / kThreads;
  static constexpr int chunks_of_x = kStep / 8, copies_of_x = rows(tiles) * chunks_of_x / kThreads;
  const unsigned char* from[copies];
  const unsigned short* from_x[copies_of_x];
  int to, to_x, begin, begin_x, row_size, inputs;

  PHI3_DEVICE Copier(const Product& p, int output, int row)
      : to(threadIdx.x / chunks * stride(bits) + threadIdx.x % chunks * 16),
        to_x(kWide * stride(bits) + place_of_x(threadIdx.x / chunks_of_x, threadIdx.x % chunks_of_x)),
        begin(threadIdx.x % chunks * 16),
        begin_x(threadIdx.x % chunks_of_x * 8),
        row_size(p.inputs / 8 * bits),
        inputs(p.inputs) {
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int line = kThreads / chunks * i + threadIdx.x / chunks;
      const int o = min(output_of(p, output, line), p.outputs - 1);
      from[i] = p.values + static_cast<int64>(row_of(p, o, line)) * row_size + begin;
    }
#pragma unroll
    for (int i = 0; i < copies_of_x; ++i) {
      const int r = min(row + kThreads / chunks_of_x * i + static_cast<int>(threadIdx.x) / chunks_of_x, p.rows - 1);
      from_x[i] = p.x + static_cast<int64>(r) * inputs + begin_x;
    }
  }
  PHI3_DEVICE void copy(unsigned char* stage, int step) const {
    if (begin + step * row_bytes(bits) < row_size)
#pragma unroll
      for (int i = 0; i < copies; ++i)
        copy16_async(stage + to + kThreads / chunks * i * stride(bits), from[i] + step * row_bytes(bits));
    if (begin_x + step * kStep < inputs)
#pragma unroll
      for (int i = 0; i < copies_of_x; ++i)
        copy16_async(stage + to_x + kThreads / chunks_of_x * i * kStep * 2, from_x[i] + step * kStep);
  }
};

template <int bits, int tiles, bool offsets>
PHI3_DEVICE void product(const Product& p) {
  PHI3_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = lane / 4, part = lane % 4;
  const int row = blockIdx.x * rows(tiles), output = blockIdx.y * kWide / (p.gated ? 2 : 1);
  const int my_first = warp % 4 * 32 + place, my_row = warp / 4 * 8 * tiles;  // in the block
  const int steps = (p.inputs + kStep - 1) / kStep, groups = p.inputs >> p.group_bits;
  const Copier<bits, tiles> copier(p, output, row);
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    copier.copy(shared + i * stage_bytes(bits, tiles), i);
    commit_copies();
  }
  int first_scale[4];  // of rows place, place + 8, place + 16, place + 24
#pragma unroll
  for (int k = 0; k < 4; ++k)
    first_scale[k] =
        groups * row_of(p, min(output_of(p, output, my_first + 8 * k), p.outputs - 1), my_first + 8 * k);
  unsigned mask = Eight<bits>::mask;
  in_register(mask);
  float sums[2][tiles][4] = {};
  for (int step = 0, at = 0; step < steps; ++step, at = at == kStages - 1 ? 0 : at + 1) {
    wait_copies<kStages - 1>();
    __syncthreads();
    const unsigned char* const stage = shared + at * stage_bytes(bits, tiles);
    const unsigned char* const integers = stage + my_first * stride(bits) + part * bits;
    const unsigned char* const x = stage + kWide * stride(bits);
#pragma unroll
    for (int j = 0; j < kStep / 32; ++j) {
      const int input = step * kStep + 32 * j;
      if (input >= p.inputs) break;
      float scale[4], min[4];
      unsigned w[2][2][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        scale[k] = to_float(half{p.scales[first_scale[k] + (input >> p.group_bits)]});
        if (offsets)
          min[k] = to_float(half{p.mins[first_scale[k] + (input >> p.group_bits)]}) + Eight<bits>::zero * scale[k];
        Eight<bits>::load(w[k / 2][k % 2], integers + 8 * k * stride(bits) + 4 * j * bits, mask);
      }
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        unsigned pairs[4];
        Eight<bits>::of_x(pairs, load16(x + place_of_x(my_row + 8 * tile + place, 4 * j + part)));
        float of_x[4] = {};
        if (offsets) sum_of_x(of_x, pairs);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float found[4] = {};
          multiply_add(found, {w[k][0][0], w[k][1][0], w[k][0][1], w[k][1][1]}, pairs[0], pairs[1]);
          multiply_add(found, {w[k][0][2], w[k][1][2], w[k][0][3], w[k][1][3]}, pairs[2], pairs[3]);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[k][tile][c] += scale[2 * k + c / 2] * found[c];
            if (offsets) sums[k][tile][c] += min[2 * k + c / 2] * of_x[c];
          }
        }
      }
    }
    __syncthreads();
    copier.copy(shared + at * stage_bytes(bits, tiles), step + kStages);
    commit_copies();
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int r = row + my_row + 8 * tile + 2 * part + column, o = output_of(p, output, my_first + 8 * k);
        if (r >= p.rows || o >= p.outputs || (p.gated && k % 2)) continue;
        const float sum = sums[k / 2][tile][k % 2 * 2 + column], up = sums[k / 2][tile][2 + column];
        store(p, r, o, p.gated ? gate(sum, up) : sum);
      }
}

}  // namespace many

// phi3_linear_many_BITS_TILES, with offsets in two of each: blocks of TILES times sixteen rows.
#define PHI3_MANY(bits, tiles)                                                                                      \
  PHI3_KERNEL(kThreads, phi3_linear_many_##bits##_##tiles, Product p) { many::product<bits, tiles, false>(p); }     \
  PHI3_KERNEL(kThreads, phi3_linear_many_##bits##_##tiles##_mins, Product p) { many::product<bits, tiles, true>(p); }
PHI3_MANY(4, 4)
PHI3_MANY(4, 8)
PHI3_MANY(8, 4)
PHI3_MANY(8, 8)

}  // namespace phi3
