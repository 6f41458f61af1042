// Low-rank updates against float64, between guard pages. Compiled for one instruction set, with native/lora/lora.cpp.
#include "lora/lora.h"

#include <cmath>
#include <cstdio>

#include "guarded.h"

namespace {

uint32_t state = 1;
int failures = 0;

// In [-4, 4): what a linear congruential generator gives, which takes no time to compile.
float next() {
  state = state * 1664525 + 1013904223;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-29f;
}

void test(int64_t I, int64_t O, int64_t R, int64_t used, Guard guard) {
  Guarded<float> x(I, guard), a(R * I, guard), b(R * O, guard), scaling(R, guard), y(O, guard);
  for (Guarded<float>* each : {&x, &a, &b, &y})
    for (float& value : *each) value = next();
  for (int64_t r = 0; r < R; ++r) {
    scaling[r] = r % 3 && used-- > 0 ? next() : 0.0f;
    if (scaling[r] == 0) a[r * I] = b[r * O] = __builtin_nanf("");  // not to be looked at
  }
  std::vector<float> before(y.begin(), y.end());
  phi3::add_update(x.data(), a.data(), b.data(), scaling.data(), I, O, R, y.data());
  for (int64_t o = 0; o < O; ++o) {
    double expected = before[o], magnitude = std::fabs(expected);
    for (int64_t r = 0; r < R; ++r) {
      if (scaling[r] == 0) continue;
      double product = 0;
      for (int64_t i = 0; i < I; ++i) {
        product += double(a[r * I + i]) * x[i];
        magnitude += std::fabs(double(scaling[r]) * b[r * O + o] * a[r * I + i] * x[i]);
      }
      expected += double(scaling[r]) * b[r * O + o] * product;
    }
    if (!(std::fabs(y[o] - expected) <= magnitude * 1e-6) && ++failures <= 20)
      std::printf("I %ld O %ld R %ld: %.9g instead of %.9g\n", static_cast<long>(I), static_cast<long>(O),
                  static_cast<long>(R), double(y[o]), expected);
  }
}

}  // namespace

int main() {
  for (int64_t I : {1, 7, 16, 37, 64, 131})
    for (int64_t O : {1, 5, 16, 33, 64})
      for (int64_t R : {1, 2, 9, 30})
        for (int64_t used : {0, 1, 100})
          for (Guard guard : {Guard::kBehind, Guard::kBefore}) test(I, O, R, used, guard);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
