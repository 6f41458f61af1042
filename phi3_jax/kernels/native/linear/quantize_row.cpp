// A row of x as integers, for weights that are integers too.
#include "linear/linear.h"
#include "linear/vectors.h"

namespace phi3 {

void quantize_row(const float* x, int64_t k, int bits, bool has_mins, const QuantizedRows& rows, int64_t row) {
  const int64_t group = rows.group;
  const int32_t start = V::zero_point(bits) - (has_mins ? 0 : bits == 8 ? 128 : 8);
  for (int64_t g = 0; g < rows.groups; ++g) {
    const int64_t at = row * rows.groups + g, left = k - g * group;
    const float* values = x + g * group;
    float padded[kMaxGroup];
    if (left < group) {
      for (int64_t i = 0; i < group; ++i) padded[i] = i < left ? values[i] : 0.0f;
      values = padded;
    }
    // As integers, the bits of |x| are in the order of the numbers, with infinity and NaN above all.
    V::Ints highest = V::set_ints(0);
    for (int64_t i = 0; i < group; i += V::kLanes)
      highest = V::bits_max(highest, V::magnitude_bits(V::load(values + i)));
    const int32_t largest_bits = V::largest(highest);
    float largest;
    __builtin_memcpy(&largest, &largest_bits, 4);
    const bool finite = largest_bits < 0x7f800000;
    // Below 2^-119 the scale would be denormal (and is 0 where those are flushed): such a group counts as zeros.
    const bool counts = finite && largest_bits >= (127 - 119) << 23;
    const V::Floats inverse = V::set(counts ? 127.0f / largest : 0.0f);
    V::Ints sum = V::set_ints(0);
    int8_t* q = rows.q + row * rows.stride + g * group;
    for (int64_t i = 0; i < group; i += V::kLanes) {
      const V::Ints rounded = counts ? V::round_to_ints(V::product(V::load(values + i), inverse)) : V::set_ints(0);
      sum = V::add(sum, rounded);
      V::store_bytes(q + i, rounded);
    }
    const int32_t total = V::total(sum);
    rows.scales[at] = counts ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
    rows.sums[at] = static_cast<float>(total);
    rows.starts[at] = start * total;
  }
}

}  // namespace phi3
