// RMSNorm (arXiv:1910.07467). The order of a row's sum depends on its length alone, so a row gets the same bits alone
// and among others; XLA picks another order for another number of rows.
#pragma once
#include <cstdint>

namespace phi3 {

// Row and Weight: float, or uint16_t, the bits of a bfloat16. out[i] = weight[i] * n, where n is x[i] over the root of
// eps + the mean of the squares of x; n and out[i] are rounded to Row. D is at least 1.
template <class Row, class Weight>
void rms_norm_row(const Row* x, const Weight* weight, int64_t D, float eps, Row* out);

}  // namespace phi3
