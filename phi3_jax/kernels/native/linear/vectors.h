// The vectors of the instruction set that is compiled, as `struct V`:
//   kLanes, Floats, Ints; zero, load, store, set, add_product (a + b * c), product, to_floats, set_ints
//   bfloat16 weights: Rounded (a rounded input), round_row (a row of them); Weights and Inputs, loaded by weights
//     (kLanes outputs x 2 inputs) and inputs (2, for all lanes); dot2 (sum + weights . inputs)
//     kBf16Rows, bf16_vectors(rows): the tile that the registers can hold
//   integer weights: halves (kLanes float16); dot32 (sums += 32 inputs of weights . q, calling fetch_step once a step);
//     zero_point(bits): what dot32 has already taken from the weights; kQuantizedRows, quantized_vectors(rows): the
//     tile
//   integers out of floats: magnitude_bits, bits_max, largest (of non-negative integers), round_to_ints, store_bytes,
//     add, total
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
