// Plain C++ with the vectors of GCC and clang, for any processor.
#pragma once
#include <cstdint>

#include "linear/fetch.h"
#include "linear/round_row.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed weights are little-endian"
#endif

namespace phi3 {

struct V {
  static constexpr int kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));

  static Floats zero() { return Floats{}; }
  static Floats load(const float* p) { return load_as<Floats>(p); }
  static void store(float* p, Floats a) { __builtin_memcpy(p, &a, 16); }
  static Floats set(float a) { return Floats{a, a, a, a}; }
  static Floats product(Floats a, Floats b) { return a * b; }
  static Floats add_product(Floats a, Floats b, Floats c) { return a + b * c; }
  static Floats to_floats(Ints a) { return __builtin_convertvector(a, Floats); }
  static Ints set_ints(int32_t a) { return Ints{a, a, a, a}; }

  using Rounded = float;
  struct Weights {
    Floats even, odd;  // the first and the second input of the pair
  };
  struct Inputs {
    Floats even, odd;
  };
  static constexpr int kBf16Rows = 2;
  static constexpr int bf16_vectors(int64_t rows) { return rows == 1 ? 4 : 2; }
  static Weights weights(const uint16_t* p) {
    const Words pairs = load_as<Words>(p);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
  }
  static void round_row(const float* x, int64_t k, float* out) { round_row_as_floats<Words>(x, k, out); }
  static Inputs inputs(const float* p) { return {set(p[0]), set(p[1])}; }
  static Floats dot2(Floats sum, Weights w, Inputs x) { return sum + w.even * x.even + w.odd * x.odd; }

  static constexpr int kQuantizedRows = 2;
  static constexpr int quantized_vectors(int64_t) { return 2; }
  static constexpr int zero_point(int) { return 0; }
  static Floats halves(const uint16_t* p) { return Floats{half(p[0]), half(p[1]), half(p[2]), half(p[3])}; }
  template <int kRows, int kVectors, int kBits, bool kOnlyPass>
  static void dot32(Ints (&dots)[kRows][kVectors], const uint8_t* w, const int8_t* q, int64_t stride, uintptr_t ahead) {
    for (int k = 0; k < 32; k += 32 / kBits) {
      fetch_step<kBits, kOnlyPass>(ahead, k * kBits / 32);
      for (int v = 0; v < kVectors; ++v) {
        const Words four = load_as<Words>(w + k * 4 * kBits + 16 * v);
        for (int i = 0; i < 32 / kBits; ++i) {
          const Ints weight = (Ints)(four >> (i % 4 * 8 + i / 4 * 4) & (kBits == 8 ? 255u : 15u));
          for (int r = 0; r < kRows; ++r) dots[r][v] += weight * q[r * stride + k + i];
        }
      }
    }
  }

  static Ints magnitude_bits(Floats a) { return (Ints)a & 0x7fffffff; }
  static Ints bits_max(Ints a, Ints b) {
    const Ints more = a > b;
    return (a & more) | (b & ~more);
  }
  static int32_t largest(Ints a) {
    int32_t most = a[0];
    for (int i = 1; i < kLanes; ++i) most = a[i] > most ? a[i] : most;
    return most;
  }
  static Ints add(Ints a, Ints b) { return a + b; }
  static int32_t total(Ints a) { return a[0] + a[1] + a[2] + a[3]; }
  static Ints round_to_ints(Floats a) {
    Ints rounded = {};
    for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(__builtin_rintf(a[i]));
    return rounded;
  }
  static void store_bytes(int8_t* p, Ints a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a[i]);
  }

  template <class T>
  static T load_as(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
  }

  // Makes no float32 denormals, because the thread that runs this may flush them to zero.
  static float half(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = (bits & 0x3ffu) << 13;
    const uint32_t high = exponent == 31 ? 255 : exponent == 0 ? 127 - 14 : exponent + 127 - 15;
    const uint32_t wide = high << 23 | fraction;
    const float magnitude = load_as<float>(&wide) - (exponent ? 0.0f : 0x1p-14f);
    return sign ? -magnitude : magnitude;
  }
};

}  // namespace phi3
