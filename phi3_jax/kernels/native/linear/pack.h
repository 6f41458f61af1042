// Weights as rows -> panels (see linear.h for the layouts). Plain C functions, called through ctypes from several
// Python threads at once, each with panels of its own: [begin, end) of the ceil(n/64) or ceil(n/32) panels of one
// layer, to whose start `packed` or `data` points. All return 0, or 1 if the sizes make no sense, and then nothing is
// written.
#pragma once
#include <cstdint>

#define PHI3_EXPORT extern "C" __attribute__((visibility("default")))

// rows [n outputs, k inputs], the bits of bf16 -> packed [ceil(n/64), ceil(k/2), 64, 2]; zeros beyond n and k.
PHI3_EXPORT int phi3_pack_bf16(const uint16_t* rows, int64_t n, int64_t k, int64_t begin, int64_t end,
                               uint16_t* packed);

// The same from float32, rounded to the nearest bf16, ties to even; a NaN stays one.
PHI3_EXPORT int phi3_pack_f32_as_bf16(const float* rows, int64_t n, int64_t k, int64_t begin, int64_t end,
                                      uint16_t* packed);

// values uint8 [n, k_padded] (bits 8) or [n, k_padded / 2] (bits 4, input 2i in the low half of byte i), scales and
// mins float16 [n, k_padded / group] -> data [ceil(n/32), k_padded * bits / 32, 128], packed scales and mins
// [ceil(n/32), k_padded / group, 32]. mins may be null, and packed_mins then too. Beyond n: the zero point, and scale
// and min 0.
PHI3_EXPORT int phi3_pack_quantized(const uint8_t* values, const uint16_t* scales, const uint16_t* mins, int64_t n,
                                    int64_t k_padded, int64_t group, int bits, int64_t begin, int64_t end,
                                    uint8_t* data, uint16_t* packed_scales, uint16_t* packed_mins);
