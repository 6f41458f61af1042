#include "linear/pack.h"

#include <algorithm>
#include <cstring>

#include "bf16.h"

namespace {

// Four 32-bit words: the unit of all layouts is one (two bf16 inputs, four bytes, eight halves of bytes).
typedef uint32_t Words __attribute__((vector_size(16)));

template <class T>
T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Eight halves of bytes h0 (lowest) .. h7 -> bytes (h0, h4), (h1, h5), (h2, h6), (h3, h7), the second in the upper
// half.
inline Words pair_halves(Words h) {
  auto spread = [](Words low) {  // four halves, in the lower 16 bits, to one in each byte
    low = (low | low << 8) & 0x00ff00ffu;
    return (low | low << 4) & 0x0f0f0f0fu;
  };
  return spread(h & 0xffffu) | spread(h >> 16) << 4;
}

inline Words pair_up(Words first, Words second) {  // the floats at even and at odd places, rounded, into words
  return phi3::round_to_bf16(first) >> 16 | phi3::round_to_bf16(second);
}

// The words at places kFrom of (a, b). GCC knows clang's name for it only from version 12 on.
template <int... kFrom>
inline Words pick(Words a, Words b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, Words{kFrom...});
#endif
}

// Words w .. w + 3 of four rows to four neighbouring outputs of lines w .. w + 3 of the panel.
template <int kWidth>
inline void transpose_four(const Words (&rows)[4], uint32_t* panel) {
  const Words low01 = pick<0, 4, 1, 5>(rows[0], rows[1]), low23 = pick<0, 4, 1, 5>(rows[2], rows[3]);
  const Words high01 = pick<2, 6, 3, 7>(rows[0], rows[1]), high23 = pick<2, 6, 3, 7>(rows[2], rows[3]);
  const Words lines[4] = {pick<0, 1, 4, 5>(low01, low23), pick<2, 3, 6, 7>(low01, low23),
                          pick<0, 1, 4, 5>(high01, high23), pick<2, 3, 6, 7>(high01, high23)};
  for (int i = 0; i < 4; ++i) std::memcpy(panel + i * kWidth, &lines[i], sizeof(Words));
}

// Transposes rows of words into a panel [words, width]. four(row, word) gives four neighbouring words of a row,
// one(row, word) a single one. In blocks that stay in L1: a row is read a few cache lines at a time, a line of the
// panel whole.
template <int kWidth, class Four, class One>
void transpose(int64_t rows, int64_t words, uint32_t fill, uint32_t* panel, const Four& four, const One& one) {
  constexpr int64_t kBlock = 4096 / kWidth;
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    const int64_t end = std::min(words, begin + kBlock);
    const int64_t in_fours = begin + (end - begin) / 4 * 4, rows_in_fours = rows / 4 * 4;
    for (int64_t r = 0; r < rows_in_fours; r += 4)
      for (int64_t w = begin; w < in_fours; w += 4)
        transpose_four<kWidth>({four(r, w), four(r + 1, w), four(r + 2, w), four(r + 3, w)}, panel + w * kWidth + r);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t w = r < rows_in_fours ? in_fours : begin; w < end; ++w) panel[w * kWidth + r] = one(r, w);
    for (int64_t w = begin; w < end; ++w) std::fill(panel + w * kWidth + rows, panel + (w + 1) * kWidth, fill);
  }
}

bool sensible(int64_t n, int64_t k, int64_t width, int64_t begin, int64_t end) {
  return n >= 1 && k >= 1 && begin >= 0 && begin <= end && end <= (n + width - 1) / width;
}

void pack_numbers(const uint16_t* numbers, int64_t n, int64_t groups, int64_t panel, uint16_t* packed) {
  const int64_t rows = std::min<int64_t>(32, n - panel * 32);
  numbers += panel * 32 * groups;
  packed += panel * 32 * groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < 32; ++r) packed[g * 32 + r] = r < rows ? numbers[r * groups + g] : 0;
}

}  // namespace

int phi3_pack_bf16(const uint16_t* rows, int64_t n, int64_t k, int64_t begin, int64_t end, uint16_t* packed) {
  if (!sensible(n, k, 64, begin, end)) return 1;
  const int64_t pairs = (k + 1) / 2, whole = k / 2;
  for (int64_t p = begin; p < end; ++p) {
    const uint16_t* from = rows + p * 64 * k;
    uint32_t* panel = reinterpret_cast<uint32_t*>(packed) + p * pairs * 64;
    const int64_t left = std::min<int64_t>(64, n - p * 64);
    transpose<64>(
        left, whole, 0, panel, [&](int64_t r, int64_t w) { return load<Words>(from + r * k + 2 * w); },
        [&](int64_t r, int64_t w) { return load<uint32_t>(from + r * k + 2 * w); });
    if (whole < pairs)
      for (int64_t r = 0; r < 64; ++r) panel[whole * 64 + r] = r < left ? from[r * k + k - 1] : 0;
  }
  return 0;
}

int phi3_pack_f32_as_bf16(const float* rows, int64_t n, int64_t k, int64_t begin, int64_t end, uint16_t* packed) {
  if (!sensible(n, k, 64, begin, end)) return 1;
  const int64_t pairs = (k + 1) / 2;
  for (int64_t p = begin; p < end; ++p) {
    const float* from = rows + p * 64 * k;
    uint32_t* panel = reinterpret_cast<uint32_t*>(packed) + p * pairs * 64;
    const auto one = [&](int64_t r, int64_t w) {
      const float* pair = from + r * k + 2 * w;
      const uint32_t second = 2 * w + 1 < k ? load<uint32_t>(pair + 1) : 0;
      return pair_up(Words{load<uint32_t>(pair)}, Words{second})[0];
    };
    const auto four = [&](int64_t r, int64_t w) {
      if (2 * w + 8 > k) return Words{one(r, w), one(r, w + 1), one(r, w + 2), one(r, w + 3)};
      const Words a = load<Words>(from + r * k + 2 * w), b = load<Words>(from + r * k + 2 * w + 4);
      return pair_up(Words{a[0], a[2], b[0], b[2]}, Words{a[1], a[3], b[1], b[3]});
    };
    transpose<64>(std::min<int64_t>(64, n - p * 64), pairs, 0, panel, four, one);
  }
  return 0;
}

int phi3_pack_quantized(const uint8_t* values, const uint16_t* scales, const uint16_t* mins, int64_t n,
                        int64_t k_padded, int64_t group, int bits, int64_t begin, int64_t end, uint8_t* data,
                        uint16_t* packed_scales, uint16_t* packed_mins) {
  if (!sensible(n, k_padded, 32, begin, end) || (bits != 4 && bits != 8) || (!mins != !packed_mins)) return 1;
  if ((group != 32 && group != 64 && group != 128) || k_padded % group) return 1;
  const int64_t row_bytes = k_padded * bits / 8, words = row_bytes / 4, groups = k_padded / group;
  for (int64_t p = begin; p < end; ++p) {
    const uint8_t* from = values + p * 32 * row_bytes;
    uint32_t* panel = reinterpret_cast<uint32_t*>(data) + p * words * 32;
    const int64_t left = std::min<int64_t>(32, n - p * 32);
    if (bits == 8)
      transpose<32>(
          left, words, 0x80808080u, panel,
          [&](int64_t r, int64_t w) { return load<Words>(from + r * row_bytes + 4 * w); },
          [&](int64_t r, int64_t w) { return load<uint32_t>(from + r * row_bytes + 4 * w); });
    else
      transpose<32>(
          left, words, 0x88888888u, panel,
          [&](int64_t r, int64_t w) { return pair_halves(load<Words>(from + r * row_bytes + 4 * w)); },
          [&](int64_t r, int64_t w) { return pair_halves(Words{load<uint32_t>(from + r * row_bytes + 4 * w)})[0]; });
    pack_numbers(scales, n, groups, p, packed_scales);
    if (mins) pack_numbers(mins, n, groups, p, packed_mins);
  }
  return 0;
}
