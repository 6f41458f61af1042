// How the rows of x are divided into tiles: blocks of y whose sums are kept in registers.
#pragma once
#include <cstdint>

namespace phi3 {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of tiles of at most `most` rows. Up to `one_pass` rows one pass over the weights is as fast as the memory;
// with more, two tiles that share each chunk of weights hide the memory's latency better.
inline int64_t tiles_of(int64_t rows, int64_t most, int64_t one_pass) {
  const int64_t tiles = divide_up(rows, most);
  return tiles == 1 && rows > one_pass ? 2 : tiles;
}

}  // namespace phi3
