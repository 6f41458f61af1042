// The product for many rows, which takes the time of its multiplications (linear_few.cu says how integers are multiplied).
//
// A block's next integers and numbers of x are on their way into shared memory while it multiplies others. A warp has 32 rows
// of them and half of the block's rows of x.
#include "integers.h"

namespace phi3 {
namespace many {

// Where the 16 bytes `chunk` of a row of x are in shared memory: 8 lanes that read together ask every bank once.
PHI3_DEVICE int place_of_x(int row, int chunk) { return row * kStep * 2 + (chunk ^ (row & 1) << 2) * 16; }

template <int bits, int tiles>
PHI3_DEVICE void copy_step(const Product& p, unsigned char* stage, int output, int row, int step) {
  constexpr int chunks = row_bytes(bits) / 16;
  const int row_size = p.inputs / 8 * bits;
#pragma unroll
  for (int i = 0; i < kWide * chunks / kThreads; ++i) {
    const int at = kThreads * i + threadIdx.x, line = at / chunks, column = at % chunks * 16;
    const int from = step * row_bytes(bits) + column;
    const int o = output_of(p, output, line);
    const bool valid = o < p.outputs && from < row_size;
    const unsigned char* global = valid ? p.values + static_cast<int64>(row_of(p, o, line)) * row_size + from : p.values;
    copy16_async(stage + line * stride(bits) + column, global, valid);
  }
  unsigned char* const x = stage + kWide * stride(bits);
#pragma unroll
  for (int i = 0; i < rows(tiles) * (kStep / 8) / kThreads; ++i) {
    const int at = kThreads * i + threadIdx.x, r = at / (kStep / 8), chunk = at % (kStep / 8);
    const int from = step * kStep + 8 * chunk;
    const bool valid = row + r < p.rows && from < p.inputs;
    const unsigned short* global = valid ? p.x + static_cast<int64>(row + r) * p.inputs + from : p.x;
    copy16_async(x + place_of_x(r, chunk), global, valid);
  }
}

template <int bits, int tiles, bool offsets>
PHI3_DEVICE void product(const Product& p) {
  PHI3_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = lane / 4, part = lane % 4;
  const int row = blockIdx.x * rows(tiles), output = blockIdx.y * kWide / (p.gated ? 2 : 1);
  const int my_first = warp % 4 * 32 + place, my_row = warp / 4 * 8 * tiles;  // in the block
  const int steps = (p.inputs + kStep - 1) / kStep, groups = p.inputs >> p.group_bits;
  const int last = (1 << p.group_bits) - 32;  // where a group's last 32 inputs begin

  for (int i = 0; i < kStages; ++i) {
    if (i < steps) copy_step<bits, tiles>(p, shared + i * stage_bytes(bits, tiles), output, row, i);
    commit_copies();
  }
  float sums[2][tiles][4] = {}, found[2][tiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 1>();
    __syncthreads();
    const unsigned char* const stage = shared + step % kStages * stage_bytes(bits, tiles);
    const unsigned char* const x = stage + kWide * stride(bits);
#pragma unroll
    for (int j = 0; j < kStep / 32; ++j) {
      const int input = step * kStep + 32 * j;
      if (input >= p.inputs) break;
      float scale[4], min[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int o = ::min(output_of(p, output, my_first + 8 * k), p.outputs - 1);
        const int at = row_of(p, o, my_first + 8 * k) * groups + (input >> p.group_bits);
        scale[k] = to_float(half{p.scales[at]});
        if (offsets) min[k] = to_float(half{p.mins[at]}) + Eight<bits>::zero * scale[k];
      }
      unsigned w[2][2][4];  // of rows place, place + 8, place + 16, place + 24
#pragma unroll
      for (int k = 0; k < 4; ++k)
        Eight<bits>::load(w[k / 2][k % 2], stage + (my_first + 8 * k) * stride(bits) + (4 * j + part) * bits);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        unsigned pairs[4];
        Eight<bits>::of_x(pairs, load16(x + place_of_x(my_row + 8 * tile + place, 4 * j + part)));
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int k = 0; k < 2; ++k)
            multiply_add(found[k][tile],
                         {w[k][0][2 * half], w[k][1][2 * half], w[k][0][2 * half + 1], w[k][1][2 * half + 1]},
                         pairs[2 * half], pairs[2 * half + 1]);
        if (offsets) {
          constexpr unsigned one = 0x3f803f80;
          float of_x[4] = {};  // the sums of x
          multiply_add(of_x, {one, one, one, one}, pairs[0], pairs[1]);
          multiply_add(of_x, {one, one, one, one}, pairs[2], pairs[3]);
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int column = 0; column < 2; ++column)
              sums[k / 2][tile][k % 2 * 2 + column] += min[k] * of_x[column];
        }
      }
      if ((input & last) != last) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            float& of_group = found[k / 2][tile][k % 2 * 2 + column];
            sums[k / 2][tile][k % 2 * 2 + column] += scale[k] * of_group;
            of_group = 0;
          }
    }
    __syncthreads();
    if (step + kStages < steps)
      copy_step<bits, tiles>(p, shared + step % kStages * stage_bytes(bits, tiles), output, row, step + kStages);
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
