// The vectors of the instruction set that is compiled, as `struct V`:
//   kLanes, Floats, Ints, Words (of uint32_t); zero, load, store, set, set_ints, to_floats, product,
//   add_product (a + b * c)
// For bfloat16 weights:
//   Rounded (a rounded input); round_row (a row of them)
//   Weights (kLanes outputs x 2 inputs), loaded by weights; Inputs (2, in all lanes), loaded by inputs
//   dot2 (sum + weights . inputs)
//   kBf16Rows, bf16_vectors(rows): the tile that the registers can hold
// For weights as integers:
//   halves (kLanes float16 as floats)
//   dot32 (sums += 32 inputs of weights . q); it calls fetch_step once a step
//   zero_point(bits): what dot32 has already taken from the weights
//   kQuantizedRows, quantized_vectors(rows): the tile that the registers can hold
// For x as integers:
//   magnitude_bits (of floats), bits_max, largest (of non-negative integers), round_to_ints, store_bytes, add, total
#pragma once

#if defined(PHI3_PORTABLE)
#include "linear/vectors_portable.h"
#elif defined(__AVX512F__)
#include "linear/vectors_avx512.h"
#elif defined(__AVX2__)
#include "linear/vectors_avx2.h"
#elif defined(__aarch64__)
#include "linear/vectors_neon.h"
#else
#include "linear/vectors_portable.h"
#endif
