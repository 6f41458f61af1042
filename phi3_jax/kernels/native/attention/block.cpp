// Attention of a block of query rows (prefill): bound by arithmetic. Lanes are query rows in scores, so that no
// sum of the softmax crosses lanes, and lie along the head in sums of values.
//
// Per block of keys: pack the keys and values that are seen, wherever they lie; scores [key][row]; p in cells
// [key step][row]; sums [row][head] += p . v.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/attend.h"
#include "attention/attention.h"
#include "attention/cells.h"
#include "attention/rows.h"
#include "attention/values.h"
#include "attention/vectors.h"

namespace phi3 {
namespace {

template <class Cells>
struct BlockScratch {
  typedef typename Cells::Cell Cell;
  static constexpr int kStep = Cells::kStep;
  Cell *q, *k, *v, *p;  // [head step][row], [key][head step], [key step][head], [key step][row]
  float* scores;        // [key][row]

  BlockScratch(float* memory, int64_t length) {
    const auto take = [&memory](int64_t floats) {
      float* start = memory;
      memory += floats;
      return start;
    };
    q = reinterpret_cast<Cell*>(take(kBlockRows * length));
    k = reinterpret_cast<Cell*>(take(kBlockKeys * length));
    v = reinterpret_cast<Cell*>(take(kBlockKeys * length));
    p = reinterpret_cast<Cell*>(take(kBlockKeys * kBlockRows));
    scores = take(kBlockKeys * kBlockRows);
  }
  static int64_t floats(int64_t length) { return (kBlockRows + 2 * kBlockKeys) * length + 2 * kBlockKeys * kBlockRows; }
};

// Keys of a tile of scores with RV vectors of rows. Fewer vectors leave registers for more keys; at most 8, because
// each takes a pointer, too.
constexpr int tile_keys(int RV) { return std::min(8, kTileSums / (RV == 3 ? 4 : RV)); }

// Scores of RV vectors of rows and tile_keys(RV) keys.
template <class Cells, int RV>
__attribute__((noinline)) void score_tile(const typename Cells::Cell* q, int64_t q_stride,
                                          const typename Cells::Cell* k, int64_t k_stride, int64_t steps,
                                          const float* factors, float* scores) {
  constexpr int kKeys = tile_keys(RV);
  V sum[kKeys][RV] = {};
  for (int64_t c = 0; c < steps; ++c) {
    typename Cells::Vec rows[RV];
#pragma GCC unroll 4
    for (int i = 0; i < RV; ++i) rows[i] = Cells::vec(q + c * q_stride + i * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const typename Cells::Vec key = Cells::broadcast(k + j * k_stride + c);
#pragma GCC unroll 4
      for (int i = 0; i < RV; ++i) sum[j][i] = Cells::multiply_add(rows[i], key, sum[j][i]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < RV; ++i) store(scores + j * q_stride + i * kLanes, sum[j][i] * splat(factors[j]));
}

// Sums of 4 rows and NV vectors of the head.
template <class Cells, int NV>
__attribute__((noinline)) void value_tile(const typename Cells::Cell* p, int64_t p_stride,
                                          const typename Cells::Cell* v, int64_t v_stride, int64_t steps,
                                          const float* decay, float* sums) {
  V sum[4][NV];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) sum[r][i] = load(sums + r * v_stride + i * kLanes) * splat(decay[r]);
  for (int64_t c = 0; c < steps; ++c) {
    typename Cells::Vec values[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) values[i] = Cells::vec(v + c * v_stride + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const typename Cells::Vec weight = Cells::broadcast(p + c * p_stride + r);
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) sum[r][i] = Cells::multiply_add(weight, values[i], sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) store(sums + r * v_stride + i * kLanes, sum[r][i]);
}

// Calls f(std::integral_constant<int, n>()) for an n in [1, Most] that is known only when the program runs.
template <int Most, class F>
inline void with_constant(int64_t n, const F& f) {
  if (n == Most) return f(std::integral_constant<int, Most>());
  if constexpr (Most > 1) with_constant<Most - 1>(n, f);
}

template <class C>
struct BlockAttention {
  typedef typename CellsFor<C>::type Cells;
  typedef typename Cells::Cell Cell;
  static constexpr int kStep = Cells::kStep;

  const AttentionTask& task;
  const Rows& rows;
  BlockScratch<Cells> room;
  float *sums, *maxima, *totals, *decay;  // [rows, length], then [rows] each
  const int64_t head_dim, length, steps, stride;

  BlockAttention(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima, float* totals,
                 float* decay)
      : task(task),
        rows(rows),
        room(scratch, padded(task.head_dim)),
        sums(sums),
        maxima(maxima),
        totals(totals),
        decay(decay),
        head_dim(task.head_dim),
        length(padded(head_dim)),
        steps((head_dim + kStep - 1) / kStep),
        stride(rows.padded_count) {}

  const C* key(int64_t slot) const { return static_cast<const C*>(task.k) + slot * task.row_length; }
  const C* value(int64_t slot) const { return static_cast<const C*>(task.v) + slot * task.row_length; }

  void pack_queries() {
    std::fill_n(room.q, steps * stride, Cell{});
    Cell* row = room.k;  // not in use yet
    for (int64_t r = 0; r < rows.count; ++r) {
      Cells::pack_row(query(task, r), head_dim, row);
      for (int64_t c = 0; c < steps; ++c) room.q[c * stride + r] = row[c];
    }
  }

  // Every score of the block, times its key's factor; keys are rounded up to kTileSums.
  void score(const Block& block) {
    float factors[kBlockKeys];
    const float factor = score_factor(task);
    const int64_t row = length / kStep;
    for (int64_t begin = 0; begin < block.keys; begin += kTileSums) {
      for (int64_t j = begin; j < begin + kTileSums; ++j) {  // behind the last key the list repeats it
        const int64_t slot = block.slots[j];
        factors[j] = task.k_scale ? factor * task.k_scale[slot] : factor;
        prefetch(value(slot), head_dim * sizeof(C));
        Cells::pack_row(key(slot), head_dim, room.k + j * row);
      }
      for (int64_t r = 0; r < stride; r += kTileVectors * kLanes) {
        const auto run = [&](auto count) {
          constexpr int RV = decltype(count)::value;
          for (int64_t j = begin; j < begin + kTileSums; j += tile_keys(RV))
            score_tile<Cells, RV>(room.q + r, stride, room.k + j * row, row, steps, factors + j,
                                  room.scores + j * stride + r);
        };
        with_constant<kTileVectors>(std::min<int64_t>(kTileVectors, (stride - r) / kLanes), run);
      }
    }
  }

  void hide(const Block& block) {
    for (int64_t j = 0; j < block.keys; ++j) {
      const I position = splat(task.k_positions[block.slots[j]]), segment = splat(segment_of(task, block.slots[j]));
      for (int64_t r = 0; r < stride; r += kLanes) {
        float* scores = room.scores + j * stride + r;
        const I seen = (load_int(rows.low + r) < position) & (position <= load_int(rows.high + r)) &
                       (load_int(rows.segment + r) == segment);
        store(scores, seen ? load(scores) : splat(kNothing));
      }
    }
  }

  // Scores -> p, in cells for the sums and, if asked for, in place.
  void soften(const Block& block, bool in_place) {
    const int64_t keys = (block.keys + kStep - 1) / kStep * kStep;
    for (int64_t j = block.keys; j < keys; ++j) std::fill_n(room.scores + j * stride, stride, kNothing);
    for (int64_t r = 0; r < stride; r += kLanes) {
      const V before = load(maxima + r);
      V now = before;
      for (int64_t j = 0; j < block.keys; ++j) now = maximum(now, load(room.scores + j * stride + r));
      const V factor = exp2(before - now);
      V total = load(totals + r) * factor;
      for (int64_t j = 0; j < keys; j += kStep) {
        V p[kStep];
#pragma GCC unroll 2
        for (int i = 0; i < kStep; ++i) {
          float* score = room.scores + (j + i) * stride + r;
          p[i] = exp2(load(score) - now);
          total = total + p[i];
          if (task.v_scale && j + i < block.keys) p[i] = p[i] * splat(task.v_scale[block.slots[j + i]]);
          if (in_place) store(score, p[i]);
        }
        Cells::pack(p, room.p + j / kStep * stride + r);
      }
      store(maxima + r, now);
      store(totals + r, total);
      store(decay + r, factor);
    }
  }

  // Packs the block's values and says whether all are finite.
  bool pack_values(const Block& block, bool check) {
    bool finite = true;
    for (int64_t j = 0; j < block.keys; j += kStep) {
      const C* pair[kStep];
      for (int i = 0; i < kStep; ++i) {
        const bool inside = j + i < block.keys;
        pair[i] = inside ? value(block.slots[j + i]) : nullptr;
        if (j + i < block.next_keys) prefetch(key(block.next_slots[j + i]), head_dim * sizeof(C));
        if (check && inside && task.v_scale) finite &= std::isfinite(task.v_scale[block.slots[j + i]]);
      }
      Cell* cells = room.v + j / kStep * length;
      Cells::pack_values(pair, head_dim, cells);
      if (!check) continue;
      const Cell zeros[kLanes] = {};
      V sum = V{};
      for (int64_t h = 0; h < head_dim; h += kLanes)
        sum = Cells::multiply_add(Cells::vec(cells + h), Cells::vec(zeros), sum);
      finite &= lanes_sum(sum) == 0;
    }
    return finite;
  }

  void add_values(const Block& block) {
    constexpr int kMost = kValueVectors;
    const int64_t vectors = (head_dim + kLanes - 1) / kLanes, chunks = (vectors + kMost - 1) / kMost;
    for (int64_t chunk = 0, begin = 0; chunk < chunks; ++chunk) {
      const int64_t size = (vectors - begin) / (chunks - chunk);
      const auto run = [&](auto count) {
        for (int64_t r = 0; r < rows.count; r += 4)
          value_tile<Cells, decltype(count)::value>(room.p + r, stride, room.v + begin * kLanes, length,
                                                    (block.keys + kStep - 1) / kStep, decay + r,
                                                    sums + r * length + begin * kLanes);
      };
      with_constant<kMost>(size, run);
      begin += size;
    }
  }

  void run() {
    pack_queries();
    each_block(task, rows, [&](const Block& block) {
      score(block);
      if (!block.full) hide(block);
      soften(block, !block.full);
      if (pack_values(block, !block.full)) return add_values(block);
      for (int64_t r = 0; r < rows.count; ++r) {
        float p[kBlockKeys];
        for (int64_t j = 0; j < block.keys; ++j) p[j] = room.scores[j * stride + r];
        add_visible_values<C>(task, rows, block, r, p, decay[r], sums + r * length);
      }
    });
  }
};

}  // namespace

void attend_block(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima,
                  float* totals) {
  float decay[kBlockRows];
  if (task.type == CacheType::kFloat32)
    BlockAttention<float>(task, rows, scratch, sums, maxima, totals, decay).run();
  else if (task.type == CacheType::kBfloat16)
    BlockAttention<uint16_t>(task, rows, scratch, sums, maxima, totals, decay).run();
  else
    BlockAttention<int8_t>(task, rows, scratch, sums, maxima, totals, decay).run();
}

int64_t block_scratch(int64_t head_dim) { return BlockScratch<FloatCells>::floats(padded(head_dim)); }

}  // namespace phi3
