// Loops over vectors that are kept in registers. Registers cannot be indexed when the program runs, so the compiler has
// to unroll such a loop.
#pragma once

#define PHI3_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PHI3_UNROLL PHI3_PRAGMA(clang loop unroll(full))
#else
#define PHI3_UNROLL PHI3_PRAGMA(GCC unroll 16)
#endif
#define PHI3_EACH(i, count) \
  PHI3_UNROLL               \
  for (int i = 0; i < (count); ++i)
