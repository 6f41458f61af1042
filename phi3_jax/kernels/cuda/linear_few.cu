// The product for up to 32 rows, which takes the time that reading the integers takes.
//
// A warp's next integers are on their way into shared memory while it multiplies others. The tensor cores get integers
// (q - zero, exact in bfloat16) and x; the sums of a group are scaled in float32. A lane's word of eight integers serves
// where sixteen inputs of an output meet sixteen of a row: which input stands where does not matter if w and x agree.
#include "integers.h"

namespace phi3 {
namespace few {

// What a lane copies of each step of its warp: 16 bytes of `copies` rows. Rows beyond the outputs are the last one again,
// and nobody stores what becomes of them.
template <int bits>
struct Copier {
  static constexpr int chunks = row_bytes(bits) / 16, copies = kTile * chunks / 32;
  const unsigned char* from[copies];
  int to, begin, row_size;

  PHI3_DEVICE Copier(const Product& p, int output, int warp, int lane)
      : to(lane / chunks * stride(bits) + lane % chunks * 16),
        begin(warp * row_bytes(bits) + lane % chunks * 16),
        row_size(p.inputs / 8 * bits) {
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int row = 32 / chunks * i + lane / chunks, o = min(output_of(p, output, row), p.outputs - 1);
      from[i] = p.values + static_cast<int64>(row_of(p, o, row)) * row_size + begin;
    }
  }
  // Copies the warp's turn `turn`.
  PHI3_DEVICE void copy(unsigned char* stage, int turn) const {
    const int offset = turn * kWarps * row_bytes(bits);
    if (begin + offset >= row_size) return;
#pragma unroll
    for (int i = 0; i < copies; ++i) copy16_async(stage + to + 32 / chunks * i * stride(bits), from[i] + offset);
  }
};

// Copies the scales (or mins) of 16 rows, which are neighbours in memory; gated, twice eight are.
PHI3_DEVICE void copy_scales(const Product& p, const unsigned short* scales, unsigned short* shared, int output) {
  const int groups = p.inputs >> p.group_bits, rows = p.gated ? 8 : kTile;
  for (int begin = 0; begin < kTile; begin += rows, shared += rows * groups) {
    const unsigned short* from = scales + static_cast<int64>(row_of(p, output, begin)) * groups;
    const int count = min(rows, p.outputs - output) * groups, whole = count / 8;
    for (int i = threadIdx.x; i < whole; i += kThreads) copy16_async(shared + 8 * i, from + 8 * i);
    for (int i = 8 * whole + threadIdx.x; i < count; i += kThreads) shared[i] = from[i];
  }
}

template <int bits, int tiles, bool offsets>
PHI3_DEVICE void product(const Product& p) {
  constexpr bool early = tiles <= 2;  // x fits into registers before the integers have come
  PHI3_DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, part = lane % 4;
  const int output = blockIdx.x * (p.gated ? 8 : kTile), groups = p.inputs >> p.group_bits;
  unsigned short* const scales = reinterpret_cast<unsigned short*>(shared);
  unsigned short* const mins = scales + kTile * groups;
  unsigned char* const stages = shared + (offsets ? 4 : 2) * kTile * groups + warp * kStages * stage_bytes(bits);
  const int steps = (p.inputs + kStep - 1) / kStep, mine = (steps - warp + kWarps - 1) / kWarps;

  copy_scales(p, p.scales, scales, output);
  if (offsets) copy_scales(p, p.mins, mins, output);
  commit_copies();
  const Copier<bits> copier(p, output, warp, lane);
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    copier.copy(stages + i * stage_bytes(bits), i);
    commit_copies();
  }
  wait_copies<kStages>();
  __syncthreads();

  const unsigned short* x_rows[tiles];  // beyond the last row it is read again, and nobody stores what becomes of it
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile)
    x_rows[tile] = p.x + static_cast<int64>(min(8 * tile + row, p.rows - 1)) * p.inputs + 8 * part;
  unsigned mask = Eight<bits>::mask;
  int first_scale = row * groups;
  in_register(mask), in_register(first_scale);
  float sums[tiles][4] = {};
  for (int i = 0, stage = 0; i < mine; ++i, stage = stage == kStages - 1 ? 0 : stage + 1) {
    const int begin = (warp + i * kWarps) * kStep;
    uint4 x[tiles][early ? 4 : 1];
    if (early)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (begin + 32 * j < p.inputs)
#pragma unroll
          for (int tile = 0; tile < tiles; ++tile) x[tile][j] = load16(x_rows[tile] + begin + 32 * j);
    wait_copies<kStages - 1>();
    warp_barrier();
    const unsigned char* const integers = stages + stage * stage_bytes(bits) + row * stride(bits) + part * bits;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int input = begin + 32 * j;
      if (input >= p.inputs) break;
      if (!early)
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) x[tile][0] = load16(x_rows[tile] + input);
      unsigned upper[4], lower[4];
      Eight<bits>::load(upper, integers + j * 4 * bits, mask);
      Eight<bits>::load(lower, integers + j * 4 * bits + 8 * stride(bits), mask);
      const int at = first_scale + (input >> p.group_bits);
      const float scale[2] = {to_float(half{scales[at]}), to_float(half{scales[at + 8 * groups]})};
      float min[2];
      if (offsets)
#pragma unroll
        for (int k = 0; k < 2; ++k) min[k] = to_float(half{mins[at + 8 * k * groups]}) + Eight<bits>::zero * scale[k];
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        unsigned pairs[4];
        Eight<bits>::of_x(pairs, x[tile][early ? j : 0]);
        float found[4] = {};
        multiply_add(found, {upper[0], lower[0], upper[1], lower[1]}, pairs[0], pairs[1]);
        multiply_add(found, {upper[2], lower[2], upper[3], lower[3]}, pairs[2], pairs[3]);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[tile][k] += scale[k / 2] * found[k];
        if (offsets) {
          float of_x[4] = {};
          sum_of_x(of_x, pairs);
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[tile][k] += min[k / 2] * of_x[k];
        }
      }
    }
    warp_barrier();
    copier.copy(stages + stage * stage_bytes(bits), i + kStages);
    commit_copies();
  }

  // All warps' sums meet in shared memory, where the integers were.
  wait_copies<0>();
  __syncthreads();
  float* const all = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      all[(warp * 8 * tiles + 8 * tile + 2 * part + k % 2) * kTile + row + k / 2 * 8] = sums[tile][k];
  __syncthreads();
  for (int i = threadIdx.x; i < 8 * tiles * kTile; i += kThreads) {
    const int r = i / kTile, o = output_of(p, output, i % kTile);
    if (r >= p.rows || o >= p.outputs || (p.gated && i % kTile >= 8)) continue;
    float sum = 0, up = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += all[w * 8 * tiles * kTile + i];
      if (p.gated) up += all[w * 8 * tiles * kTile + i + 8];
    }
    store(p, r, o, p.gated ? gate(sum, up) : sum);
  }
}

}  // namespace few

// phi3_linear_few_BITS_TILES, with offsets in two of each: TILES times eight rows.
#define PHI3_FEW(bits, tiles)                                                                                     \
  PHI3_KERNEL(kThreads, phi3_linear_few_##bits##_##tiles, Product p) { few::product<bits, tiles, false>(p); }     \
  PHI3_KERNEL(kThreads, phi3_linear_few_##bits##_##tiles##_mins, Product p) { few::product<bits, tiles, true>(p); }
PHI3_FEW(4, 1)
PHI3_FEW(4, 2)
PHI3_FEW(4, 4)
PHI3_FEW(8, 1)
PHI3_FEW(8, 2)
PHI3_FEW(8, 4)

}  // namespace phi3
