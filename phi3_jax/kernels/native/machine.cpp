// What this machine can do at best, for benchmarks: bytes read per second, and operations per second of the
// instructions that matrix products are made of. Called through ctypes. Uses threads of its own, because nothing of XLA
// runs here.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Keeps a value that nothing reads from being optimised away.
template <class T>
void keep(const T& value) {
  asm volatile("" : : "g"(&value) : "memory");
}

// work(thread) does a slice of the work and returns how much that was. Each thread repeats it for `seconds`.
// Returns the sum of the threads' rates, each over its own time.
template <class F>
double rate(int threads, double seconds, const F& work) {
  std::atomic<int> ready{0};
  std::vector<double> rates(threads, 0.0);
  auto body = [&](int thread) {
    work(thread);  // touches the memory, wakes wide vector units
    ready.fetch_add(1);
    while (ready.load() < threads) std::this_thread::yield();
    const auto begin = Clock::now();
    double done = 0, elapsed = 0;
    do {
      done += work(thread);
      elapsed = seconds_since(begin);
    } while (elapsed < seconds);
    rates[thread] = done / elapsed;
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (auto& other : others) other.join();
  double sum = 0;
  for (double each : rates) sum += each;
  return sum;
}

// ---- reading: every turn takes kBlock bytes of each of kRuns places ----

constexpr int kRuns = 4, kBlock = 128;
constexpr int64_t kTurn = kRuns * kBlock;
constexpr int64_t kHugePage = int64_t{1} << 21;

// Reads `turns` turns; run r of turn t begins at data + t * step + r * apart. So one function reads a part of memory as
// one stream (step = kTurn, apart = kBlock) or as kRuns streams (step = kBlock, apart = a quarter of the part).
using Reader = uint64_t (*)(const char* data, int64_t turns, int64_t step, int64_t apart);

typedef uint64_t Word2 __attribute__((vector_size(16), may_alias));

uint64_t read_plain(const char* data, int64_t turns, int64_t step, int64_t apart) {
  Word2 sums[kRuns] = {};
  for (int64_t t = 0; t < turns; ++t, data += step)
    for (int j = 0; j < kBlock / 16; ++j)
      for (int r = 0; r < kRuns; ++r) sums[r] ^= *reinterpret_cast<const Word2*>(data + r * apart + 16 * j);
  const Word2 sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return sum[0] ^ sum[1];
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, int64_t turns, int64_t step, int64_t apart) {
  __m256i sums[kRuns] = {};
  for (int64_t t = 0; t < turns; ++t, data += step)
    for (int j = 0; j < kBlock / 32; ++j)
      for (int r = 0; r < kRuns; ++r)
        sums[r] = _mm256_xor_si256(sums[r], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + r * apart) + j));
  alignas(32) uint64_t sum[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sum),
                     _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3])));
  return sum[0] ^ sum[3];
}

__attribute__((target("avx512f"))) uint64_t read_avx512(const char* data, int64_t turns, int64_t step, int64_t apart) {
  __m512i sums[kRuns] = {};
  for (int64_t t = 0; t < turns; ++t, data += step)
    for (int j = 0; j < kBlock / 64; ++j)
      for (int r = 0; r < kRuns; ++r)
        sums[r] = _mm512_xor_si512(sums[r], _mm512_load_si512(reinterpret_cast<const __m512i*>(data + r * apart) + j));
  alignas(64) uint64_t sum[8];
  _mm512_store_si512(sum, _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
  return sum[0] ^ sum[7];
}
#endif

Reader best_reader() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
#endif
  return read_plain;
}

// ---- arithmetic: each function runs kTurns turns of kChains independent chains, and returns the operations done ----

constexpr int kTurns = 20000;
constexpr int kChains = 12;  // enough to cover an instruction's latency, few enough for the registers

// Hides what a value is from the compiler, which would otherwise compute chains that begin alike only once.
#if defined(__x86_64__)
#define PHI3_HIDE(x) asm volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define PHI3_HIDE(x) asm volatile("" : "+w"(x))
#else
#define PHI3_HIDE(x) asm volatile("" : "+m"(x))
#endif

// The turns are unrolled by hand, because the vector type and the instruction differ and everything else is the same.
#define PHI3_CHAINS(STEP)                                                                             \
  for (int i = 0; i < kChains; ++i) PHI3_HIDE(acc[i]);                                                \
  for (int turn = 0; turn < kTurns; ++turn) {                                                         \
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11) \
  }

typedef float Float4 __attribute__((vector_size(16)));

// Products and sums of four floats: what every processor has.
double fma_plain() {
  Float4 acc[kChains] = {}, x = {1e-3f, 1e-3f, 1e-3f, 1e-3f};
  // Hidden again in each step, or the product would be computed once for all.
#define STEP(i) \
  PHI3_HIDE(x); \
  acc[i] += x * x;
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 4 * kChains * kTurns;
}

// One product of bytes after another: what a kernel without a dot product instruction does.
double int8_plain() {
  int32_t acc[kChains] = {};
  uint8_t x = 3;
  int8_t y = 5;
  for (int turn = 0; turn < kTurns; ++turn)
    for (int i = 0; i < kChains; ++i) {
      asm volatile("" : "+r"(x), "+r"(y));
      acc[i] += static_cast<int32_t>(x) * y;
    }
  keep(acc);
  return 2.0 * kChains * kTurns;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double fma_avx2() {
  __m256 acc[kChains] = {}, x = _mm256_set1_ps(1e-3f);
  PHI3_HIDE(x);
#define STEP(i) acc[i] = _mm256_fmadd_ps(x, x, acc[i]);
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 8 * kChains * kTurns;
}

__attribute__((target("avx512f"))) double fma_avx512() {
  __m512 acc[kChains] = {}, x = _mm512_set1_ps(1e-3f);
  PHI3_HIDE(x);
#define STEP(i) acc[i] = _mm512_fmadd_ps(x, x, acc[i]);
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 16 * kChains * kTurns;
}

__attribute__((target("avx512f,avx512bf16"))) double bf16_avx512() {
  __m512 acc[kChains] = {}, one = _mm512_set1_ps(1e-3f);
  PHI3_HIDE(one);
  const __m512bh x = _mm512_cvtne2ps_pbh(one, one);
#define STEP(i) acc[i] = _mm512_dpbf16_ps(acc[i], x, x);
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 32 * kChains * kTurns;
}

__attribute__((target("avx512f,avx512vnni"))) double int8_avx512() {
  __m512i acc[kChains] = {}, x = _mm512_set1_epi8(3);
  PHI3_HIDE(x);
#define STEP(i) acc[i] = _mm512_dpbusd_epi32(acc[i], x, x);
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 64 * kChains * kTurns;
}

// Three instructions for 32 products.
__attribute__((target("avx2"))) double int8_avx2() {
  __m256i acc[kChains] = {}, x = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  for (int turn = 0; turn < kTurns; ++turn)
    for (int i = 0; i < kChains; ++i) {
      PHI3_HIDE(x);  // else the same product is computed once for all
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
    }
  keep(acc);
  return 2.0 * 32 * kChains * kTurns;
}
#elif defined(__aarch64__)
double fma_neon() {
  float32x4_t acc[kChains] = {}, x = vdupq_n_f32(1e-3f);
  PHI3_HIDE(x);
#define STEP(i) acc[i] = vfmaq_f32(acc[i], x, x);
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 4 * kChains * kTurns;
}

// Two products of eight, and two sums in pairs.
double int8_neon() {
  int32x4_t acc[kChains] = {};
  int8x16_t x = vdupq_n_s8(3);
  for (int turn = 0; turn < kTurns; ++turn)
    for (int i = 0; i < kChains; ++i) {
      PHI3_HIDE(x);
      acc[i] = vpadalq_s16(acc[i], vmull_s8(vget_low_s8(x), vget_low_s8(x)));
      acc[i] = vpadalq_s16(acc[i], vmull_high_s8(x, x));
    }
  keep(acc);
  return 2.0 * 16 * kChains * kTurns;
}

#if defined(__linux__)
// As text, because compilers do not agree on how one function gets the intrinsics of a later instruction set.
double int8_sdot() {
  int32x4_t acc[kChains] = {};
  const int8x16_t x = vdupq_n_s8(3);
#define STEP(i) asm volatile(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %1.16b" : "+w"(acc[i]) : "w"(x));
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 16 * kChains * kTurns;
}

double bf16_bfdot() {
  float32x4_t acc[kChains] = {};
  const uint16x8_t x = vdupq_n_u16(0x3a83);  // 1e-3
#define STEP(i) asm volatile(".arch armv8.2-a+bf16\n\tbfdot %0.4s, %1.8h, %1.8h" : "+w"(acc[i]) : "w"(x));
  PHI3_CHAINS(STEP)
#undef STEP
  keep(acc);
  return 2.0 * 8 * kChains * kTurns;
}
#endif
#endif

enum Kind { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
using Loop = double (*)();

// The fastest loop of a kind that this processor can run, or nullptr.
Loop best_loop(int kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2");
  if (kind == kFloat32 && wide) return fma_avx512;
  if (kind == kFloat32 && avx2 && __builtin_cpu_supports("fma")) return fma_avx2;
  if (kind == kBfloat16 && wide && __builtin_cpu_supports("avx512bf16")) return bf16_avx512;
  if (kind == kInt8 && wide && __builtin_cpu_supports("avx512vnni")) return int8_avx512;
  if (kind == kInt8 && avx2) return int8_avx2;
#elif defined(__aarch64__)
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1UL << 20, kBf16 = 1UL << 14;  // the kernel's HWCAP_ASIMDDP and HWCAP2_BF16
  if (kind == kInt8 && (getauxval(AT_HWCAP) & kDotProduct)) return int8_sdot;
  if (kind == kBfloat16 && (getauxval(AT_HWCAP2) & kBf16)) return bf16_bfdot;
#endif
  if (kind == kFloat32) return fma_neon;
  if (kind == kInt8) return int8_neon;
#endif
  if (kind == kFloat32) return fma_plain;
  if (kind == kInt8) return int8_plain;
  return nullptr;
}

bool sensible(int threads, double seconds) { return threads >= 1 && threads <= 4096 && seconds >= 0 && seconds <= 60; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Bytes per second of reading `bytes` of memory over and over, each thread its own part, as one stream or as several,
// whichever is faster; `seconds` for both together. Take a size far beyond the caches. -1 if there is no memory for it,
// or an argument makes no sense.
double phi3_read_bandwidth(int64_t bytes, int threads, double seconds) {
  if (!sensible(threads, seconds) || bytes < threads * kTurn || bytes > (int64_t{1} << 40)) return -1;
  const int64_t part = bytes / threads / kTurn * kTurn,
                whole = (part * threads + kHugePage - 1) / kHugePage * kHugePage;
  std::unique_ptr<char, void (*)(void*)> data(static_cast<char*>(std::aligned_alloc(kHugePage, whole)), std::free);
  if (!data) return -1;
#if defined(__linux__)
  madvise(data.get(), whole, MADV_HUGEPAGE);  // as numpy does for the arrays that weights are loaded into
#endif
  // Written by the thread that reads it, so that it lies close to it; and not with 0, which may all be one page.
  std::vector<std::thread> writers;
  for (int t = 0; t < threads; ++t) writers.emplace_back([&, t] { std::memset(data.get() + t * part, t + 1, part); });
  for (auto& writer : writers) writer.join();
  const Reader read = best_reader();
  std::vector<uint64_t> sums(threads * 8);  // a cache line for each
  auto measure = [&](int64_t step, int64_t apart) {
    return rate(threads, seconds / 2, [&, step, apart](int thread) {
      sums[thread * 8] ^= read(data.get() + thread * part, part / kTurn, step, apart);
      return static_cast<double>(part);
    });
  };
  return std::max(measure(kTurn, kBlock), measure(kBlock, part / kRuns));
}

// Operations (products and sums) per second in registers, of chains that do not wait for one another. kind: 0 float32,
// 1 dot products of bfloat16, 2 dot products of 8-bit integers. 0 if this processor has no such instruction, -1 for
// senseless arguments.
double phi3_peak_rate(int kind, int threads, double seconds) {
  if (!sensible(threads, seconds) || kind < kFloat32 || kind > kInt8) return -1;
  const Loop loop = best_loop(kind);
  return loop ? rate(threads, seconds, [loop](int) { return loop(); }) : 0;
}

}  // extern "C"
#pragma GCC visibility pop
