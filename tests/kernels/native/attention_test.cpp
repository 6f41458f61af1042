// The attention kernels against float64, in buffers between guard pages. Compiled for one instruction set, with the
// files of native/attention.
#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "guarded.h"
#include "numbers.h"

using phi3::AttentionTask;
using phi3::CacheType;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
int failures = 0;

// Whether blocks of queries are rounded to bfloat16 where the cache is no float32.
#if defined(__AVX512BF16__)
constexpr bool kRoundsQueries = true;
#else
constexpr bool kRoundsQueries = false;
#endif

enum class Layout { kFull, kRing, kHoles };
enum class Poison { kNone, kInvisible, kVisibleKey, kVisibleValue, kVisibleQuery, kFuture };

struct Case {
  CacheType type = CacheType::kFloat32;
  int64_t tokens = 1, slots = 33, group = 1, head_dim = 64, extra = 0, window = 0, splits = 1;
  Layout layout = Layout::kFull;
  bool padding = false, segments = false;
  Poison poison = Poison::kNone;
  float magnitude = 1;

  std::string text() const {
    const auto number = [](const char* name, int64_t n) { return std::string(" ") + name + "=" + std::to_string(n); };
    return number("type", int(type)) + number("T", tokens) + number("S", slots) + number("G", group) +
           number("H", head_dim) + number("extra", extra) + number("window", window) + number("splits", splits) +
           number("layout", int(layout)) + number("padding", padding) + number("segments", segments) +
           number("poison", int(poison)) + number("magnitude", int64_t(magnitude));
  }
};

// One head's cache as floats, and as stored.
struct Cache {
  std::vector<float> k, v, k_scale, v_scale;  // [S, head_dim]; [S]
  std::vector<char> k_bytes, v_bytes;         // [S, H]
};

void set(const Case& c, std::vector<char>& stored, int64_t i, float x) {
  if (c.type == CacheType::kFloat32) std::memcpy(&stored[4 * i], &x, 4);
  if (c.type == CacheType::kBfloat16) {
    const uint16_t u = to_bf16(x);
    std::memcpy(&stored[2 * i], &u, 2);
  }
}

Cache make_cache(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal(0, c.magnitude);
  std::uniform_int_distribution<int> byte(-127, 127);
  const int64_t H = c.head_dim + c.extra;
  Cache cache;
  cache.k_scale.assign(c.type == CacheType::kInt8 ? c.slots : 0, 0.f);
  cache.v_scale = cache.k_scale;
  for (auto* scales : {&cache.k_scale, &cache.v_scale})
    for (float& each : *scales) each = std::abs(normal(random)) / 64;
  for (auto [floats, stored, scales] :
       {std::tuple(&cache.k, &cache.k_bytes, &cache.k_scale), std::tuple(&cache.v, &cache.v_bytes, &cache.v_scale)}) {
    floats->resize(c.slots * c.head_dim);
    stored->assign(c.slots * H * phi3::bytes(c.type), static_cast<char>(0xff));  // NaN in the padding of heads
    for (int64_t s = 0; s < c.slots; ++s)
      for (int64_t h = 0; h < c.head_dim; ++h) {
        float x = normal(random);
        if (c.type == CacheType::kBfloat16) x = from_bf16(to_bf16(x));
        if (c.type == CacheType::kInt8) {
          const int8_t q = static_cast<int8_t>(byte(random));
          (*stored)[s * H + h] = static_cast<char>(q);
          x = q * (*scales)[s];
        }
        (*floats)[s * c.head_dim + h] = x;
        set(c, *stored, s * H + h, x);
      }
  }
  return cache;
}

void poison_slot(const Case& c, Cache& cache, int64_t slot, float x, bool key, bool value) {
  const int64_t H = c.head_dim + c.extra;
  for (int64_t h = 0; h < c.head_dim; ++h) {
    if (key) cache.k[slot * c.head_dim + h] = x, set(c, cache.k_bytes, slot * H + h, x);
    if (value) cache.v[slot * c.head_dim + h] = x, set(c, cache.v_bytes, slot * H + h, x);
  }
  if (c.type == CacheType::kInt8 && key) cache.k_scale[slot] = x;
  if (c.type == CacheType::kInt8 && value) cache.v_scale[slot] = x;
}

struct Positions {
  std::vector<int32_t> q, k, q_segments, k_segments;
};

Positions make_positions(const Case& c, std::mt19937& random) {
  Positions p;
  const int64_t used = c.layout == Layout::kRing ? c.slots + 5 : c.layout == Layout::kFull ? c.slots : c.slots * 3 / 4;
  const int64_t first = std::max<int64_t>(0, used - c.tokens);
  for (int64_t t = 0; t < c.tokens; ++t) p.q.push_back(static_cast<int32_t>(first + t));
  p.k.assign(c.slots, -1);
  for (int64_t i = std::max<int64_t>(0, used - c.slots); i < used; ++i) p.k[i % c.slots] = static_cast<int32_t>(i);
  if (c.layout == Layout::kHoles)
    for (int32_t& each : p.k)
      if (random() % 3 == 0) each = -1;
  if (c.padding)
    for (int32_t& each : p.q)
      if (random() % 2 == 0) each = -1;
  if (c.segments) {
    for (int64_t t = 0; t < c.tokens; ++t) p.q_segments.push_back(static_cast<int32_t>(random() % 3));
    for (int64_t s = 0; s < c.slots; ++s) p.k_segments.push_back(static_cast<int32_t>(random() % 3));
  }
  return p;
}

bool visible(const Case& c, const Positions& p, int64_t t, int64_t s) {
  const int64_t q = p.q[t], k = p.k[s];
  return k >= 0 && k <= q && (c.window == 0 || k > q - c.window) && (!c.segments || p.q_segments[t] == p.k_segments[s]);
}

// One query of one head: the output, and how much the rounding of p may change each element.
void naive(const Case& c, const Positions& p, const Cache& cache, const float* q, bool rounded, int64_t t,
           std::vector<double>& out, std::vector<double>& spread) {
  out.assign(c.head_dim, 0.);
  spread.assign(c.head_dim, 0.);
  std::vector<double> scores(c.slots, -std::numeric_limits<double>::infinity());
  double most = -std::numeric_limits<double>::infinity(), total = 0;
  bool any = false, nan = false;
  for (int64_t s = 0; s < c.slots; ++s) {
    if (!visible(c, p, t, s)) continue;
    double sum = 0;
    for (int64_t h = 0; h < c.head_dim; ++h) {
      const float x = rounded ? from_bf16(to_bf16(q[h])) : q[h];
      sum += static_cast<double>(x) * cache.k[s * c.head_dim + h];
    }
    scores[s] = sum / std::sqrt(static_cast<double>(c.head_dim));
    any = true;
    nan |= std::isnan(scores[s]);
    most = std::max(most, scores[s]);
  }
  if (!any) return;
  for (int64_t s = 0; s < c.slots; ++s) total += visible(c, p, t, s) ? std::exp(scores[s] - most) : 0.;
  for (int64_t s = 0; s < c.slots; ++s) {
    if (!visible(c, p, t, s)) continue;
    const double weight = nan ? kNan : std::exp(scores[s] - most) / total;
    for (int64_t h = 0; h < c.head_dim; ++h) {
      out[h] += weight * cache.v[s * c.head_dim + h];
      spread[h] += std::abs(weight * cache.v[s * c.head_dim + h]);
    }
  }
}

void run(const Case& c, Guard guard, unsigned seed) {
  std::mt19937 random(seed);
  const Positions p = make_positions(c, random);
  Cache cache = make_cache(c, random);
  const int64_t heads = c.group + 1;  // one query head of a neighbour, which must stay as it is
  std::vector<float> q(c.tokens * heads * c.head_dim);
  std::normal_distribution<float> normal(0, c.magnitude);
  for (float& each : q) each = normal(random);

  const float poisons[] = {kNan, kInf, -kInf, 3e38f};
  for (int64_t s = 0; s < c.slots; ++s) {
    bool seen = false;
    for (int64_t t = 0; t < c.tokens; ++t) seen |= visible(c, p, t, s);
    if (c.poison == Poison::kInvisible && !seen) poison_slot(c, cache, s, poisons[s % 4], true, true);
  }
  // Visible to the last token at most.
  const int64_t latest = std::max_element(p.k.begin(), p.k.end()) - p.k.begin();
  if (c.poison == Poison::kVisibleKey) poison_slot(c, cache, latest, kNan, true, false);
  if (c.poison == Poison::kVisibleValue) poison_slot(c, cache, latest, kNan, false, true);
  if (c.poison == Poison::kFuture) poison_slot(c, cache, latest, poisons[seed % 4], true, true);
  if (c.poison == Poison::kVisibleQuery) q[(c.tokens / 2) * heads * c.head_dim] = kNan;

  Guarded<float> q_(q, guard), k_scale(cache.k_scale, guard), v_scale(cache.v_scale, guard);
  Guarded<char> k(cache.k_bytes, guard), v(cache.v_bytes, guard);
  Guarded<int32_t> q_positions(p.q, guard), k_positions(p.k, guard), q_segments(p.q_segments, guard),
      k_segments(p.k_segments, guard);
  Guarded<float> out(std::vector<float>(q.size(), -7.f), guard);

  AttentionTask task{};
  task.q = q_.data(), task.out = out.data();
  task.token_stride = heads * c.head_dim, task.group = c.group, task.head_dim = c.head_dim;
  task.type = c.type, task.k = k.data(), task.v = v.data();
  if (c.type == CacheType::kInt8) task.k_scale = k_scale.data(), task.v_scale = v_scale.data();
  task.row_length = c.head_dim + c.extra;
  task.q_positions = q_positions.data(), task.k_positions = k_positions.data(), task.window = c.window;
  if (c.segments) task.q_segments = q_segments.data(), task.k_segments = k_segments.data();
  // What lies in a buffer that is used again may be anything.
  Guarded<char> scratch(std::vector<char>(phi3::scratch_bytes(c.head_dim), static_cast<char>(0xff)), guard);
  for (int64_t begin = 0; begin < c.tokens * c.group; begin += phi3::kBlockRows) {
    task.row_begin = begin, task.row_end = std::min(begin + phi3::kBlockRows, c.tokens * c.group);
    task.slot_begin = 0, task.slot_end = c.slots;
    if (c.splits > 1) phi3::narrow(task);
    const int64_t first = task.slot_begin, slots = task.slot_end - first;
    const int64_t size = phi3::partial_size(task.rows(), c.head_dim);
    Guarded<float> partials(std::vector<float>(c.splits * size, kNan), guard);
    for (int64_t i = 0; i < c.splits; ++i) {
      task.slot_begin = first + slots * i / c.splits, task.slot_end = first + slots * (i + 1) / c.splits;
      phi3::attend(task, scratch.data(), partials.data() + i * size);
    }
    phi3::finish(task, partials.data(), c.splits);
  }

  std::vector<double> expected, spread;
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t g = 0; g < heads; ++g) {
      // Products with the huge value that this one sees overflow float32; only the others matter.
      if (c.poison == Poison::kFuture && g < c.group && visible(c, p, t, latest)) continue;
      const int64_t row = t * c.group + g,
                    block = std::min<int64_t>(phi3::kBlockRows, c.tokens * c.group - row / 64 * 64);
      const bool rounded = kRoundsQueries && c.type != CacheType::kFloat32 && block > 4;
      if (g < c.group)
        naive(c, p, cache, &q[(t * heads + g) * c.head_dim], rounded, t, expected, spread);
      else
        expected.assign(c.head_dim, -7.), spread.assign(c.head_dim, 0.);
      for (int64_t h = 0; h < c.head_dim; ++h) {
        const double got = out[(t * heads + g) * c.head_dim + h], want = expected[h];
        const double allowed =
            spread[h] * (rounded ? 1. / 200 : 2e-5 * std::max(1.f, c.magnitude * c.magnitude)) + 1e-30;
        if (std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= allowed) continue;
        if (++failures <= 20)
          std::printf("FAILED%s: t=%ld g=%ld h=%ld: %g, not %g\n", c.text().c_str(), long(t), long(g), long(h), got,
                      want);
        return;
      }
    }
}

constexpr CacheType kTypes[] = {CacheType::kFloat32, CacheType::kBfloat16, CacheType::kInt8};

void test_attend() {
  unsigned seed = 0;
  int cases = 0;
  const auto both = [&](const Case& c) {
    ++cases, ++seed;
    run(c, seed % 2 ? Guard::kBehind : Guard::kBefore, seed);
  };
  for (CacheType type : kTypes) {
    for (int64_t head_dim = 1; head_dim <= 130; ++head_dim)
      for (int64_t tokens : {1, 2, 3, 4, 7}) {
        Case c{type, tokens, 37, 1, head_dim};
        c.extra = head_dim % 3;
        c.splits = 1 + head_dim % 2;
        both(c);
      }
    for (int64_t head_dim : {8, 24, 64, 80, 96, 128})
      for (int64_t tokens : {1, 2, 7, 33, 130})
        for (int64_t group : {1, 3, 4})
          for (int64_t window : {0, 1, 5, 70, 2047}) {
            Case c{type, tokens, 131 + tokens, group, head_dim, (128 - head_dim) % 128, window};
            c.layout = static_cast<Layout>(seed % 3);
            c.padding = seed % 5 == 0;
            c.segments = seed % 7 == 0;
            c.splits = 1 + seed % 3;
            c.poison = seed % 2 ? Poison::kInvisible : Poison::kNone;
            both(c);
          }
    for (int poison = 1; poison <= 5; ++poison)
      for (int64_t tokens : {1, 2, 7, 33, 130})
        for (int64_t group : {1, 3})
          for (int layout = 0; layout < 3; ++layout)
            for (int segments = 0; segments < 2; ++segments) {
              Case c{type, tokens, 140, group, 24};
              c.layout = static_cast<Layout>(layout);
              c.poison = static_cast<Poison>(poison);
              c.segments = segments;
              c.splits = 1 + seed % 2;
              both(c);
            }
    for (float magnitude : {1e-20f, 8.f})
      for (int64_t tokens : {1, 9}) {
        Case c{type, tokens, 300, 1, 40};
        c.magnitude = magnitude;
        both(c);
      }
    // No query, no slot that anyone sees, more slots than are looked up ahead, more query heads than a block has rows.
    both(Case{type, 3, 0, 1, 16});
    both(Case{type, 9, 2600, 1, 16, 0, 1500});
    both(Case{type, 1, 2600, 2, 16, 0, 0, 3});
    both(Case{type, 2, 50, 71, 16});
  }
  std::printf("%d attention cases\n", cases);
}

void expect(bool ok, const char* what, int64_t n) {
  if (!ok && ++failures <= 20) std::printf("FAILED: %s, n=%ld\n", what, long(n));
}

void test_store() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int64_t n = 1; n <= 130; ++n)
    for (Guard guard : {Guard::kBehind, Guard::kBefore})
      for (int special = 0; special < 4; ++special) {
        Guarded<float> x(n, guard), scale(std::vector<float>{-7.f}, guard);
        for (int64_t i = 0; i < n; ++i) x[i] = normal(random) * (special == 3 ? 1e30f : 1.f);
        if (special == 1) x[n / 2] = n % 2 ? kNan : kInf;
        if (special == 2) std::memset(x.data(), 0, 4 * n);
        const int64_t H = n + n % 5;
        Guarded<float> f(std::vector<float>(H, -7.f), guard);
        Guarded<uint16_t> b(std::vector<uint16_t>(H, 7), guard);
        Guarded<int8_t> q(std::vector<int8_t>(H, 7), guard);
        phi3::store_row(CacheType::kFloat32, x.data(), n, H, f.data(), scale.data());
        phi3::store_row(CacheType::kBfloat16, x.data(), n, H, b.data(), scale.data());
        expect(scale[0] == -7.f, "floats have no scale", n);
        phi3::store_row(CacheType::kInt8, x.data(), n, H, q.data(), scale.data());
        float most = 0;
        for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
        if (special == 1)
          expect(!std::isfinite(scale[0]), "the scale of NaN or inf", n);
        else
          expect(scale[0] == most / 127, "scale", n);
        for (int64_t i = 0; i < H; ++i) {
          const float want = i < n ? x[i] : 0.f;
          expect(!std::memcmp(&f[i], &want, 4), "float32", n);
          const uint16_t rounded = to_bf16(want);
          expect(std::isnan(want) ? std::isnan(from_bf16(b[i])) : b[i] == rounded, "bfloat16", n);
          const float quotient = special == 1 || special == 2 ? 0.f : std::nearbyint(want / scale[0]);
          expect(q[i] == quotient, "int8", n);
        }
      }
}

}  // namespace

int main() {
  test_attend();
  test_store();
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
