#define PHI3_BF16 0
#define PHI3_NAME "avx512"
#define PHI3_TABLE attention_avx512
#include "vectors_avx512.h"
