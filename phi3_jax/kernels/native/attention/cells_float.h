// Cells of one float.
#pragma once
#include <cstdint>

#include "attention/vectors.h"

namespace phi3 {

struct FloatCells {
  typedef float Cell;
  typedef V Vec;
  static constexpr int kStep = 1;

  static Vec vec(const Cell* p) { return load(p); }
  static Vec broadcast(const Cell* p) { return splat(*p); }
  static V multiply_add(Vec a, Vec b, V c) { return fma(a, b, c); }

  template <class C>
  static void pack_row(const C* row, int64_t n, Cell* cells) {
    each_vector(row, n, [&](int64_t i, V x) { store(cells + i, x); });
  }
  template <class C>
  static void pack_values(const C* const* rows, int64_t n, Cell* cells) {
    pack_row(rows[0], n, cells);
  }
  static void pack(const V* x, Cell* cells) { store(cells, *x); }
};

}  // namespace phi3
