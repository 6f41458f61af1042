// The linear kernels against float64; and the packing, against the definition of the layouts. Compiled for one
// instruction set, with the files of native/linear.
#include "linear/linear.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "linear/pack.h"
#include "linear/panels.h"
#include "numbers.h"

using namespace phi3;

namespace {

std::mt19937 random_bits(1);
int failures = 0;
double worst_error = 0;  // relative to the sum of the magnitudes of all terms

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
float normal() { return std::normal_distribution<float>()(random_bits); }

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (++failures <= 20) {
    std::vprintf(format, arguments);
    std::puts("");
  }
  va_end(arguments);
}

enum Kind { kRandom, kHuge, kTiny, kDenormal, kZero, kMixed, kOutlier, kKinds };
const char* const kind_names[] = {"random", "huge", "tiny", "denormal", "zero", "mixed", "outlier"};

float value_of(Kind kind) {
  switch (kind) {
    case kHuge: return normal() * 1e36f;
    case kTiny: return normal() * 1e-30f;
    case kDenormal: return normal() * 1e-39f;
    case kZero: return below(2) ? 0.0f : -0.0f;
    case kMixed: return normal() * std::pow(10.0f, static_cast<float>(below(41) - 20));
    case kOutlier: return below(40) ? normal() * 1e-3f : normal() * 1e4f;
    default: return normal();
  }
}

Guarded<float> rows_of(Kind kind, int64_t count, Guard guard) {
  Guarded<float> x(count, guard);
  for (float& value : x) value = value_of(kind);
  return x;
}

std::string describe(const char* what, int64_t m, int64_t n, int64_t k, Kind kind) {
  return std::string(what) + " rows " + std::to_string(m) + " outputs " + std::to_string(n) + " inputs " +
         std::to_string(k) + " " + kind_names[kind];
}

// One output against float64. `magnitude`: the sum of the magnitudes of the terms; `terms`: how many float32 sums;
// `lost`: what may be missing because denormals count as zero.
void compare(const std::string& where, float got, double expected, double magnitude, int64_t terms, double lost) {
  if (std::isnan(expected) || std::isinf(expected) || magnitude > 3e38) {
    // Partial sums may overflow where the whole does not; a finite result must still be right.
    if (!std::isfinite(got) || std::isinf(magnitude)) return;
  }
  const double error = std::fabs(got - expected), bound = magnitude * 0x1p-23 * (3 + std::sqrt(terms)) + lost;
  if (!(error <= bound)) fail("%s: %.9g instead of %.9g, bound %.3g", where.c_str(), got, expected, bound);
  if (magnitude > lost * 1e6 && std::isfinite(error)) worst_error = std::max(worst_error, error / magnitude);
}

// Calls part(first_row, last_row, first_panel, last_panel) for a random division of the work.
template <class Part>
void divided(int64_t rows, int64_t panels, const Part& part) {
  for (int64_t row = 0; row < rows;) {
    const int64_t last_row = below(3) ? rows : row + 1 + below(rows - row);
    for (int64_t panel = 0; panel < panels;) {
      const int64_t last = below(3) ? panels : panel + 1 + below(panels - panel);
      part(row, last_row, panel, last);
      panel = last;
    }
    row = last_row;
  }
}

// Spoils one input, and expects that row, and no other, to change. run(x) computes y.
template <class Run>
void spoil(const std::string& where, Guarded<float>& x, int64_t m, int64_t n, int64_t k, bool always_nan,
           const Run& run) {
  const Guarded<float> before = run();
  const int64_t row = below(m), column = below(k);
  const float kept = x[row * k + column];
  for (float bad : {from_bits(0x7fc00000), from_bits(0xffffffff), from_bits(0x7f800001), from_bits(0x7f800000),
                    from_bits(0xff800000)}) {
    x[row * k + column] = bad;
    const Guarded<float> after = run();
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const float value = after[i * n + j], old = before[i * n + j];
        if (i != row && std::memcmp(&value, &old, 4)) fail("%s: row %d changed with another", where.c_str(), int(i));
        if (i == row && std::isfinite(value)) fail("%s: %g hidden, output %g", where.c_str(), bad, value);
        if (i == row && (always_nan || std::isnan(bad)) && !std::isnan(value))
          fail("%s: %g gave %g", where.c_str(), bad, value);
      }
  }
  x[row * k + column] = kept;
}

constexpr int64_t kLayers = 3, kLayer = 1;  // the layers around the one that is used are filled with NaN or 0xff

void test_bf16(int64_t m, int64_t n, int64_t k, Kind kind, Kind weight_kind, bool spoiled) {
  const std::string where = describe("bf16", m, n, k, kind);
  const Guard guard = below(2) ? Guard::kBefore : Guard::kBehind;
  Bf16Matrix matrix = {nullptr, n, k};
  const int64_t pairs = matrix.pairs(), layer_size = matrix.count() * pairs * 128;
  Guarded<uint16_t> weights(n * k, guard), stack(kLayers * layer_size, guard);
  std::fill(stack.begin(), stack.end(), 0xffff);
  for (uint16_t& weight : weights) weight = to_bf16(value_of(weight_kind));
  uint16_t* layer = stack.data() + kLayer * layer_size;
  divided(1, matrix.count(), [&](int64_t, int64_t, int64_t first, int64_t last) {
    if (phi3_pack_bf16(weights.data(), n, k, first, last, layer)) fail("%s: packing refused", where.c_str());
  });
  for (int64_t p = 0; p < matrix.count(); ++p)
    for (int64_t j = 0; j < pairs; ++j)
      for (int64_t o = 0; o < 64; ++o)
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t output = p * 64 + o, input = 2 * j + i;
          const uint16_t expected = output < n && input < k ? weights[output * k + input] : 0;
          if (layer[((p * pairs + j) * 64 + o) * 2 + i] != expected) return fail("%s: packed wrongly", where.c_str());
        }
  matrix.panels = layer;

  Guarded<float> x = rows_of(kind, m * k, guard);
  auto run = [&] {
    const int64_t stride = matrix.x_stride(), row_bytes = stride * kRoundedBytes;
    Guarded<char> rounded(m * row_bytes, guard);
    std::fill(rounded.begin(), rounded.end(), char(0xff));
    for (int64_t r = 0; r < m; ++r) round_row(x.data() + r * k, k, rounded.data() + r * row_bytes);
    Guarded<float> y(m * n, guard);
    std::fill(y.begin(), y.end(), std::nanf(""));
    divided(m, matrix.count(), [&](int64_t row, int64_t last_row, int64_t first, int64_t last) {
      Guarded<float> edge((last_row - row) * kBf16Panel, guard);
      bf16_panels(matrix, rounded.data(), row, last_row, first, last, edge.data(), y.data());
    });
    return y;
  };
  const Guarded<float> y = run();
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0, lost = k * 0x1p-125;
      for (int64_t c = 0; c < k; ++c) {
        const double a = from_bf16(to_bf16(x[i * k + c])), b = from_bf16(weights[j * k + c]);
        sum += a * b;
        magnitude += std::fabs(a * b);
        if (denormal(a) || denormal(b) || denormal(x[i * k + c])) lost += std::fabs(a * b);
      }
      compare(where, y[i * n + j], sum, magnitude, k, lost);
    }
  if (spoiled) {
    const auto state = random_bits;
    spoil(where, x, m, n, k, false, [&] {
      random_bits = state;  // divides the work the same way each time, so that rows can be compared bit for bit
      return run();
    });
  }
}

void check_rows(const std::string& where, const Guarded<float>& x, int64_t m, int64_t k, const QuantizedRows& rows) {
  const float tiny = 0x1p-119f;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t g = 0; g < rows.groups; ++g) {
      const int64_t begin = g * rows.group, end = std::min(k, begin + rows.group), at = r * rows.groups + g;
      float largest = 0;
      for (int64_t c = begin; c < end; ++c) largest = std::max(largest, std::fabs(x[r * k + c]));
      const float scale = rows.scales[at];
      if (scale != (largest < tiny ? 0.0f : largest / 127.0f)) return fail("%s: scale %g", where.c_str(), scale);
      int sum = 0;
      for (int64_t c = begin; c < begin + rows.group; ++c) {
        const int q = rows.q[r * rows.stride + c];
        const double exact = c < end && scale > 0 ? double(x[r * k + c]) / scale : 0;
        if (std::fabs(q - exact) > 0.5001 || q < -127) return fail("%s: %g became %d", where.c_str(), exact, q);
        sum += q;
      }
      if (rows.sums[at] != sum) return fail("%s: sum %g instead of %d", where.c_str(), rows.sums[at], sum);
    }
}

struct Format {
  int bits;
  int64_t group;
  bool has_mins;
};

void test_quantized(const Format& f, int64_t m, int64_t n, int64_t k, Kind kind, bool spoiled) {
  const std::string format =
      std::to_string(f.bits) + " bits, groups of " + std::to_string(f.group) + (f.has_mins ? ", mins," : "");
  const std::string where = describe(format.c_str(), m, n, k, kind);
  const Guard guard = below(2) ? Guard::kBefore : Guard::kBehind;
  QuantizedMatrix matrix = {{nullptr, nullptr, nullptr, f.bits}, n, k, f.group};
  const int64_t groups = matrix.groups(), padded = groups * f.group, row_bytes = padded * f.bits / 8,
                zero = f.bits == 8 ? 128 : 8;
  const int64_t layer_bytes = matrix.count() * matrix.panel_bytes(), layer_scales = matrix.count() * groups * 32;
  Guarded<uint8_t> values(n * row_bytes, guard), stack(kLayers * layer_bytes, guard);
  Guarded<uint16_t> scales(n * groups, guard), mins(f.has_mins ? n * groups : 0, guard),
      scale_stack(kLayers * layer_scales, guard);
  Guarded<uint16_t> min_stack(f.has_mins ? kLayers * layer_scales : 0, guard);
  for (auto* all : {&scale_stack, &min_stack}) std::fill(all->begin(), all->end(), 0xffff);
  std::fill(stack.begin(), stack.end(), 0xff);
  const int extreme = static_cast<int>(below(3));  // all weights at one end of their range, at the other, or anywhere
  for (uint8_t& value : values) {
    if (f.bits == 8)
      value = extreme == 0 ? 255 : extreme == 1 ? 1 : 1 + below(255);
    else
      value = extreme == 0 ? 0xff : extreme == 1 ? 0 : below(256);
  }
  // Of all magnitudes, denormal float16 too, and of both signs; never infinite.
  for (auto* all : {&scales, &mins})
    for (uint16_t& half : *all)
      half = below(8) ? 0x2400 + below(0x800) + below(2) * 0x8000 : below(2) * 0x8000 + below(0x7c00);
  auto integer = [&](int64_t output, int64_t input) -> int {  // as phi3_jax.quantization stores it
    if (f.bits == 8) return values[output * row_bytes + input];
    return values[output * row_bytes + input / 2] >> (input % 2 * 4) & 15;
  };

  uint8_t* data = stack.data() + kLayer * layer_bytes;
  uint16_t* layer_scale = scale_stack.data() + kLayer * layer_scales;
  uint16_t* layer_min = f.has_mins ? min_stack.data() + kLayer * layer_scales : nullptr;
  divided(1, matrix.count(), [&](int64_t, int64_t, int64_t first, int64_t last) {
    if (phi3_pack_quantized(values.data(), scales.data(), f.has_mins ? mins.data() : nullptr, n, padded, f.group,
                            f.bits, first, last, data, layer_scale, layer_min))
      fail("%s: packing refused", where.c_str());
  });
  for (int64_t output = 0; output < matrix.count() * 32; ++output) {
    const int64_t p = output / 32, o = output % 32;
    for (int64_t input = 0; input < padded; ++input) {
      const int64_t step = 32 / f.bits, j = input / step, i = input % step;
      const int byte = data[(p * padded / step + j) * 128 + o * 4 + i % 4];
      const int got = f.bits == 8 ? byte : byte >> (i / 4 * 4) & 15;
      if (got != (output < n ? integer(output, input) : zero)) return fail("%s: packed wrongly", where.c_str());
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (p * groups + g) * 32 + o;
      if (layer_scale[at] != (output < n ? scales[output * groups + g] : 0))
        return fail("%s: scale packed wrongly", where.c_str());
      if (layer_min && layer_min[at] != (output < n ? mins[output * groups + g] : 0))
        return fail("%s: min packed wrongly", where.c_str());
    }
  }
  for (int64_t i = 0; i < layer_bytes; ++i)
    if (stack[i] != 0xff || stack[2 * layer_bytes + i] != 0xff)
      return fail("%s: packed into another layer", where.c_str());
  matrix.layer = {data, layer_scale, layer_min, f.bits};

  Guarded<float> x = rows_of(kind, m * k, guard);
  Guarded<int8_t> q(m * matrix.x_stride(), guard);
  Guarded<float> x_scales(m * groups, guard), sums(m * groups, guard);
  Guarded<int32_t> starts(m * groups, guard);
  const QuantizedRows rows = {q.data(),          x_scales.data(), sums.data(), starts.data(),
                              matrix.x_stride(), groups,          f.group};
  auto run = [&] {
    std::fill(q.begin(), q.end(), 0x7f);
    for (int64_t r = 0; r < m; ++r) quantize_row(x.data() + r * k, k, f.bits, f.has_mins, rows, r);
    Guarded<float> y(m * n, guard);
    std::fill(y.begin(), y.end(), std::nanf(""));
    divided(m, matrix.count(), [&](int64_t row, int64_t last_row, int64_t first, int64_t last) {
      Guarded<float> edge((last_row - row) * kQuantizedPanel, guard);
      quantized_panels(matrix, rows, row, last_row, first, last, edge.data(), y.data());
    });
    return y;
  };
  const Guarded<float> y = run();
  check_rows(where, x, m, k, rows);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < k; ++c) {
        const int64_t g = c / f.group;
        const double input = double(x_scales[i * groups + g]) * q[i * rows.stride + c],
                     scale = from_half(scales[j * groups + g]);
        const double weight =
            f.has_mins ? integer(j, c) * scale + from_half(mins[j * groups + g]) : (integer(j, c) - zero) * scale;
        sum += input * weight;
        const double parts =
            f.has_mins ? std::fabs(integer(j, c) * scale) + std::fabs(from_half(mins[j * groups + g])) : weight;
        magnitude += std::fabs(input * parts);
      }
      compare(where, y[i * n + j], sum, magnitude, groups, k * 0x1p-125);
    }
  if (spoiled) {
    const auto state = random_bits;
    spoil(where, x, m, n, k, true, [&] {
      random_bits = state;
      return run();
    });
  }
}

// Every float16 as a scale, and then as a min: y = scale * 1 and y = min * 1.
void test_all_halves() {
  constexpr int64_t n = 65536, k = 1, group = 32;
  for (bool as_min : {false, true}) {
    std::vector<uint8_t> data(n * group, as_min ? 1 : 129);
    std::vector<uint16_t> halves(n), zeros(n);
    for (int64_t i = 0; i < n; ++i) halves[i] = static_cast<uint16_t>(i);
    const QuantizedMatrix matrix = {
        {data.data(), as_min ? zeros.data() : halves.data(), as_min ? halves.data() : nullptr, 8}, n, k, group};
    std::vector<int8_t> q(matrix.x_stride());
    float x = 1, scale, sum;
    int32_t start;
    const QuantizedRows rows = {q.data(), &scale, &sum, &start, matrix.x_stride(), 1, group};
    quantize_row(&x, k, 8, as_min, rows, 0);
    std::vector<float> y(n), edge(32);
    quantized_panels(matrix, rows, 0, 1, 0, matrix.count(), edge.data(), y.data());
    for (int64_t i = 0; i < n; ++i) {
      const double expected = from_half(static_cast<uint16_t>(i));
      const bool right = std::isnan(expected)   ? std::isnan(y[i])
                         : std::isinf(expected) ? y[i] == expected
                                                : std::fabs(y[i] - expected) <= 3e-7 * std::fabs(expected);
      if (!right) fail("float16 0x%04x gave %g instead of %g", int(i), y[i], expected);
    }
  }
}

// Values where rounding to bf16 is delicate, by the kernels and by the packing.
void test_rounding() {
  std::vector<float> delicate;
  for (uint32_t high :
       {0x3f80u, 0x3f81u, 0x7f7fu, 0xff7fu, 0x4000u, 0x80u, 0x7f80u, 0xff80u, 0x7fffu, 0xffffu, 0x7fc0u, 0u, 0x8000u})
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) delicate.push_back(from_bits(high << 16 | low));
  for (int i = 0; i < 2000; ++i) delicate.push_back(from_bits(random_bits()));
  const int64_t count = static_cast<int64_t>(delicate.size());
  for (int64_t k : {count, count - 1, int64_t{1}, int64_t{2}, int64_t{17}, int64_t{31}, int64_t{32}}) {
    Guarded<float> x(k);
    std::copy(delicate.begin(), delicate.begin() + k, x.begin());
    const int64_t even = (k + 1) / 2 * 2;
    Guarded<char> rounded(even * kRoundedBytes);
    Guarded<uint16_t> packed(even * 64);
    round_row(x.data(), k, rounded.data());
    if (phi3_pack_f32_as_bf16(x.data(), 1, k, 0, 1, packed.data())) fail("packing refused");
    for (int64_t i = 0; i < even; ++i) {
      const uint16_t expected = i < k ? to_bf16(x[i]) : 0, pack = packed[i / 2 * 128 + i % 2];
      uint32_t bits = 0;
      std::memcpy(&bits, rounded.data() + i * kRoundedBytes, kRoundedBytes);
      const uint16_t got = kRoundedBytes == 4 ? bits >> 16 : bits;
      auto same = [&](uint16_t other, bool flushes) {
        if (std::isnan(from_bf16(expected))) return std::isnan(from_bf16(other));
        return other == expected || (flushes && denormal(x[i]) && std::fabs(from_bf16(other)) <= 0x1p-126);
      };
      if (!same(got, true) || !same(pack, false)) fail("%a rounded to %04x, packed as %04x", double(x[i]), got, pack);
    }
  }
}

int64_t odd_up_to(int64_t most) { return below(most) | 1; }

void test_all(bool quick) {
  test_rounding();
  test_all_halves();
  std::vector<Format> formats;
  for (int bits : {8, 4})
    for (int64_t group : {32, 64, 128})
      for (bool has_mins : {false, true}) formats.push_back({bits, group, has_mins});
  int turn = 0;
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32, 130})
    for (int repeat = 0; repeat < (quick ? 2 : 7); ++repeat, ++turn) {
      const Kind kind = static_cast<Kind>(turn % kKinds), weights = static_cast<Kind>(turn / kKinds % kKinds);
      test_bf16(m, odd_up_to(130), odd_up_to(130), kind, weights, true);
      test_bf16(m, 1 + below(200), 1 + below(520), kRandom, kRandom, false);
      for (const Format& format : formats) {
        test_quantized(format, m, odd_up_to(130), odd_up_to(130), kind, m < 32);
        if (repeat % 2) test_quantized(format, m, 1 + below(70), 1 + below(1200), kRandom, false);
      }
    }
  for (auto [m, n, k] : {std::array<int64_t, 3>{1, 192, 3072}, {7, 192, 3072}, {13, 33, 8192}, {1, 65, 8191}}) {
    test_bf16(m, n, k, kRandom, kRandom, true);
    for (const Format& format : formats) test_quantized(format, m, n, k, kRandom, false);
  }
  std::printf("largest error %.2e of the sum of magnitudes\n", worst_error);
}

}  // namespace

// With an argument: fewer sizes, for an emulator.
int main(int count, char**) {
  test_all(count > 1);
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
