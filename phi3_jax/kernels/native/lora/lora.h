// Low-rank updates of rows that may have different ones. Axis letters: I inputs, O outputs, R ranks of all adapters.
#pragma once
#include <cstdint>

namespace phi3 {

// y [O] += sum over r of scaling[r] * (a[r] . x) * b[r], for one row: x [I], a [R, I], b [R, O]. Ranks whose scaling is
// 0 are not looked at, so a row's bits do not depend on what else there is.
void add_update(const float* x, const float* a, const float* b, const float* scaling, int64_t I, int64_t O, int64_t R,
                float* y);

}  // namespace phi3
