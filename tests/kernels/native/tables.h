// Every table of a kind ("linear" or "attention") that is compiled for this sort of processor.
#pragma once
#include "isa.h"

#if defined(__x86_64__)
#define PHI3_TABLES(kind) \
  { &phi3::kind##_portable, &phi3::kind##_avx2, &phi3::kind##_avx512, &phi3::kind##_avx512_bf16 }
#elif defined(__aarch64__)
#define PHI3_TABLES(kind) \
  { &phi3::kind##_portable, &phi3::kind##_neon }
#else
#define PHI3_TABLES(kind) \
  { &phi3::kind##_portable }
#endif
