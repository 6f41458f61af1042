// The instructions of intrinsics.h for the emulator, which includes this.
#pragma once

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline int __float2int_rn(float x) {  // NaN gives 0, and what is too large the nearest integer, as on a card
  return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(std::clamp(x, -2147483648.f, 2147483520.f)));
}
inline float __expf(float x) { return std::exp(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}
inline void __threadfence() {}

namespace phi3 {

#define PHI3_LINE int line = __builtin_LINE()
template <class T>
T shuffle(T value, int lane, PHI3_LINE) {
  return emulated::from<T>(emulated::exchange(value, line)[lane & 31]);
}
template <class T>
T shuffle_xor(T value, int mask, PHI3_LINE) {
  return emulated::from<T>(emulated::exchange(value, line)[(emulated::lane() ^ mask) & 31]);
}
inline unsigned ballot(bool is, PHI3_LINE) {
  const emulated::Slot* all = emulated::exchange(is, line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(emulated::from<bool>(all[i])) << i;
  return bits;
}
inline void warp_barrier(PHI3_LINE) { emulated::pause(emulated::At::kWarp, line); }
inline bool block_any(bool is, PHI3_LINE) {
  const size_t turn = emulated::block.fibers[emulated::block.current].asked++;
  if (emulated::block.any.size() <= turn) emulated::block.any.resize(turn + 1);
  if (is) emulated::block.any[turn] = true;
  emulated::barrier(line);
  return emulated::block.any[turn];
}

inline float fast_exp2(float x) { return x < -126.f ? 0.f : std::exp2(x); }

inline bf16 to_bf16(float x) {  // to nearest, ties to even
  if (std::isnan(x)) return {0x7fff};
  const unsigned bits = bits_as<unsigned>(x);
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline unsigned pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<unsigned>(to_bf16(high).bits) << 16;
}
inline float to_float(half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(fraction, -24)
                                     : std::ldexp(1024 + fraction, exponent - 25);
  return x.bits & 0x8000 ? -size : size;
}
inline half to_half(float x) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return {0x7fff};
  if (std::fabs(x) >= 65520) return {static_cast<unsigned short>(sign | 0x7c00)};
  const int exponent = std::max(x == 0 ? -14 : std::ilogb(x), -14);
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)));
  return {static_cast<unsigned short>(sign | ((exponent + 14) * 1024 + fraction))};  // 1024 is the exponent's last bit
}

template <class T>
T load_aligned(const void* p) {
  emulated::aligned(p, sizeof(T));
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline unsigned load4(const void* p) { return load_aligned<unsigned>(p); }
inline uint2 load8(const void* p) { return load_aligned<uint2>(p); }
inline uint4 load16(const void* p) { return load_aligned<uint4>(p); }
inline uint4 load16_once(const void* p) { return load16(p); }
inline void store16(void* p, uint4 x) {
  emulated::aligned(p);
  std::memcpy(p, &x, 16);
}

inline void copy16_async(void* shared, const void* global, bool valid = true) {
  emulated::aligned(shared);
  if (valid) emulated::aligned(global);
  emulated::block.fibers[emulated::block.current].copies.back().push_back({shared, valid ? global : nullptr});
}
inline void commit_copies() { emulated::block.fibers[emulated::block.current].copies.emplace_back(); }
template <int newest>
void wait_copies() {
  auto& groups = emulated::block.fibers[emulated::block.current].copies;
  for (; groups.size() > newest + 1; groups.pop_front())
    for (const auto& copy : groups.front())
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
}

inline void load_matrices(unsigned (&r)[4], const void* row, PHI3_LINE) {
  emulated::aligned(row);
  const emulated::Slot* rows = emulated::exchange(row, line);
  for (int i = 0; i < 4; ++i)
    std::memcpy(&r[i], emulated::from<const char*>(rows[8 * i + emulated::lane() / 4]) + emulated::lane() % 4 * 4, 4);
  emulated::pause(emulated::At::kWarp, line);  // all have read before one writes there
}
inline void load_matrices_transposed(unsigned (&r)[4], const void* row, PHI3_LINE) {
  emulated::aligned(row);
  const emulated::Slot* rows = emulated::exchange(row, line);
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int j = 0; j < 2; ++j)
      std::memcpy(&pair[j],
                  emulated::from<const char*>(rows[8 * i + emulated::lane() % 4 * 2 + j]) + emulated::lane() / 4 * 2, 2);
    std::memcpy(&r[i], pair, 4);
  }
  emulated::pause(emulated::At::kWarp, line);
}

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, PHI3_LINE) {
  struct Given {
    unsigned a[4], b[2];
  };
  const emulated::Slot* all = emulated::exchange(Given{{a[0], a[1], a[2], a[3]}, {b0, b1}}, line);
  const int g = emulated::lane() / 4, t = emulated::lane() % 4 * 2;
  for (int k = 0; k < 16; k += 2) {
    Given row = emulated::from<Given>(all[g * 4 + k % 8 / 2]);
    for (int j = 0; j < 2; ++j) {
      const unsigned b = emulated::from<Given>(all[(t + j) * 4 + k % 8 / 2]).b[k / 8];
      for (int half = 0; half < 2; ++half) {
        const unsigned x = row.a[half + k / 8 * 2];
        c[2 * half + j] += __uint_as_float(x << 16) * __uint_as_float(b << 16) +
                           __uint_as_float(x & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
      }
    }
  }
}
#undef PHI3_LINE

}  // namespace phi3
