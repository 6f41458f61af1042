// The intrinsics of AVX-512, without the warnings of GCC 12 about values that its own header leaves undefined.
#pragma once

#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace phi3 {

// A pair of bfloat16 in all lanes. clang 16 and 17 crash, in an endless recursion, where they fold this into a product.
inline __m512i everywhere(int pair) {
  __m512i all = _mm512_set1_epi32(pair);
#if defined(__clang__) && (__clang_major__ == 16 || __clang_major__ == 17)
  asm("" : "+v"(all));
#endif
  return all;
}

}  // namespace phi3
