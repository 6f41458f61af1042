// RMSNorm against float64, between guard pages. Compiled for one instruction set, with native/norm/norm.cpp.
#include "norm/norm.h"

#include <cmath>
#include <cstdio>
#include <type_traits>
#include <vector>

#include "guarded.h"
#include "numbers.h"

namespace {

uint32_t state = 1;
int failures = 0;

// In [-4, 4): what a linear congruential generator gives, which takes no time to compile.
float next() {
  state = state * 1664525 + 1013904223;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-29f;
}

template <class T>
T as(float value) {
  if constexpr (std::is_same_v<T, float>)
    return value;
  else
    return to_bf16(value);
}
double number(float value) { return value; }
double number(uint16_t bits) { return from_bf16(bits); }

template <class Row, class Weight>
void test(int64_t D, float size, float eps, Guard guard) {
  Guarded<Row> x(D, guard), out(D, guard);
  Guarded<Weight> weight(D, guard);
  for (Row& value : x) value = as<Row>(next() * size);
  for (Weight& value : weight) value = as<Weight>(next());
  phi3::rms_norm_row(x.data(), weight.data(), D, eps, out.data());
  double squares = 0;
  for (const Row value : x) squares += number(value) * number(value);
  const double root = std::sqrt(squares / static_cast<double>(D) + eps);
  // Two roundings to bfloat16, or a few to float32 and those of the sum.
  const double relative = std::is_same_v<Row, float> ? 8e-7 : 0x1p-7;
  for (int64_t i = 0; i < D; ++i) {
    const double expected = number(weight[i]) * number(x[i]) / root;
    if (!(std::fabs(number(out[i]) - expected) <= std::fabs(expected) * relative + 1e-36) && ++failures <= 20)
      std::printf("D %ld size %g eps %g: %.9g instead of %.9g\n", static_cast<long>(D), double(size), double(eps),
                  number(out[i]), expected);
  }
}

}  // namespace

int main() {
  for (int64_t D : {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 67, 127, 128, 131, 576, 577, 3072})
    for (float size : {1.0f, 0.0f, 1e-30f, 1e17f})
      for (float eps : {1e-5f, 1e-12f, 1e3f})
        for (Guard guard : {Guard::kBehind, Guard::kBefore}) {
          test<float, float>(D, size, eps, guard);
          test<float, uint16_t>(D, size, eps, guard);
          test<uint16_t, float>(D, size, eps, guard);
          test<uint16_t, uint16_t>(D, size, eps, guard);
        }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
