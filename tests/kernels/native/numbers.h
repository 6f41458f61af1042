// Number formats, written as their definitions say rather than fast.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t toward_zero = bits >> 16;
  if (std::isnan(value)) return toward_zero | 0x40;
  if (std::isinf(value)) return toward_zero;
  // In float64 the next bf16 after the largest is 2^128, which stands for infinity.
  const uint16_t next = toward_zero + 1;
  const double low = std::fabs(from_bf16(toward_zero)),
               high = std::isinf(from_bf16(next)) ? 0x1p128 : std::fabs(from_bf16(next));
  const double up = high - std::fabs(value), down = std::fabs(value) - low;
  return up < down || (up == down && toward_zero % 2) ? next : toward_zero;
}

inline double from_half(uint16_t bits) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

inline bool denormal(double value) { return value != 0 && std::fabs(value) < 0x1p-126; }
