#define PHI3_BF16 1
#define PHI3_NAME "avx512_bf16"
#define PHI3_TABLE attention_avx512_bf16
#include "vectors_avx512.h"
