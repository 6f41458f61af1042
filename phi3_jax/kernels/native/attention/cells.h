// "Cells" are what the tiles of block.cpp multiply: 4 bytes that hold kStep neighbours along the axis that is summed
// over. CellsFor<C> says which ones the keys and values of a cache of type C are packed into.
#pragma once
#include <cstdint>

#include "attention/cells_float.h"
#if defined(__AVX512BF16__)
#include "attention/cells_avx512_bf16.h"
#endif

namespace phi3 {

template <class C>
struct CellsFor {
  typedef FloatCells type;
};

#if defined(__AVX512BF16__)
template <>
struct CellsFor<uint16_t> {
  typedef Bf16Cells type;
};
template <>
struct CellsFor<int8_t> {  // bfloat16 holds every int8; the scales go into factors and p
  typedef Bf16Cells type;
};
#endif

}  // namespace phi3
