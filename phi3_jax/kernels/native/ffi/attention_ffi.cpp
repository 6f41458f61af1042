// The handlers that XLA calls for attention over the key-value cache and for writing to it: they check the operands and
// deal the work out to XLA's threads. Axis letters as in attention.h.
#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "ffi/check.h"
#include "ffi/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr int64_t kSerialWork = 1 << 16;  // products that one thread does before another would have woken up
constexpr int64_t kSplitSlots = 256;      // fewer slots are not worth merging for
constexpr int64_t kTasksPerThread = 4;    // threads get unequal shares of the processor

bool same(Shape a, std::initializer_list<int64_t> b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

ffi::Error check_shape(const std::string& who, const char* name, Shape shape, std::initializer_list<int64_t> expected,
                       const char* because) {
  if (same(shape, expected)) return ffi::Error::Success();
  return invalid(who + name + " has shape " + text(shape) + ", expected " +
                 text(Shape(expected.begin(), expected.size())) + " " + because);
}

// One layer of the cache.
struct Cache {
  CacheType type;
  int64_t B, K, S, H, layer;

  int64_t head(int64_t b, int64_t k) const { return (layer * B + b) * K + k; }  // counted over all layers
  int64_t head_bytes() const { return S * H * bytes(type); }
};

ffi::Error check_cache(const std::string& who, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, const Floats& k_scale,
                       const Floats& v_scale, const Ints& layer, Cache* cache) {
  const Shape shape = k.dimensions();
  if (k.element_type() == ffi::F32)
    cache->type = CacheType::kFloat32;
  else if (k.element_type() == ffi::BF16)
    cache->type = CacheType::kBfloat16;
  else if (k.element_type() == ffi::S8)
    cache->type = CacheType::kInt8;
  else
    return invalid(who + "the cache's type is none of float32, bfloat16 and int8");
  if (v.element_type() != k.element_type()) return invalid(who + "k and v have different types");
  if (shape.size() != 5 || !std::equal(shape.begin(), shape.end(), v.dimensions().begin(), v.dimensions().end()))
    return invalid(who + "k has shape " + text(shape) + " and v " + text(v.dimensions()) +
                   ", expected [L, B, K, S, H] twice");
  const int64_t L = shape[0];
  cache->B = shape[1], cache->K = shape[2], cache->S = shape[3], cache->H = shape[4];
  if (cache->S > INT32_MAX)
    return invalid(who + "the cache has " + std::to_string(cache->S) + " slots, more than 2^31 - 1");
  for (const auto& [name, scales] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    if (cache->type == CacheType::kInt8) {
      ffi::Error error =
          check_shape(who, name, scales->dimensions(), {L, cache->B, cache->K, cache->S}, "for an int8 cache");
      if (error.failure()) return error;
    } else if (scales->element_count() != 0) {
      return invalid(who + name + " has shape " + text(scales->dimensions()) + ", but only an int8 cache has scales");
    }
  }
  return check_layer(who, layer, L, "the cache has", &cache->layer);
}

// Which tokens of a row are written: those at a position, and of several in one slot the one with the latest position.
void choose(const int32_t* positions, int64_t T, int64_t S, std::vector<int32_t>& winner, std::vector<char>& chosen) {
  chosen.assign(T, 0);
  int64_t first = INT32_MAX, last = -1;
  for (int64_t t = 0; t < T; ++t) {
    if (positions[t] < 0) continue;
    chosen[t] = 1;
    first = std::min<int64_t>(first, positions[t]);
    last = std::max<int64_t>(last, positions[t]);
  }
  if (last - first < S) return;  // no two positions share a slot
  winner.assign(S, -1);
  for (int64_t t = 0; t < T; ++t) {
    if (!chosen[t]) continue;
    int32_t& best = winner[positions[t] % S];
    if (best >= 0) chosen[positions[best] <= positions[t] ? best : t] = 0;
    if (chosen[t]) best = static_cast<int32_t>(t);
  }
}

ffi::Error cache_write(ffi::ThreadPool pool, ffi::AnyBuffer k_in, ffi::AnyBuffer v_in, Floats k_scale_in,
                       Floats v_scale_in, Floats k_new, Floats v_new, Ints positions, Ints layer,
                       ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, ffi::Result<Floats> k_scale,
                       ffi::Result<Floats> v_scale) {
  const std::string who = "phi3_cache_write: ";
  Cache cache;
  if (ffi::Error error = check_cache(who, *k, *v, *k_scale, *v_scale, layer, &cache); error.failure()) return error;
  const bool scaled = cache.type == CacheType::kInt8;
  for (const auto& [in, written] : {std::pair(&k_in, &*k), std::pair(&v_in, &*v)})
    if (in->element_type() != written->element_type() || in->size_bytes() != written->size_bytes())
      return invalid(who + "an output has shape " + text(written->dimensions()) + ", but its input " +
                     text(in->dimensions()));
  if (k->untyped_data() != k_in.untyped_data() || v->untyped_data() != v_in.untyped_data() ||
      (scaled &&
       (k_scale->untyped_data() != k_scale_in.untyped_data() || v_scale->untyped_data() != v_scale_in.untyped_data())))
    return invalid(who +
                   "an output is not the input's own buffer; the call needs input_output_aliases for k, v and scales");
  const Shape shape = k_new.dimensions();
  if (shape.size() != 4 || shape[0] != cache.B || shape[2] != cache.K || shape[3] < 1 || shape[3] > cache.H)
    return invalid(who + "k_new has shape " + text(shape) + ", expected [" + std::to_string(cache.B) + ", T, " +
                   std::to_string(cache.K) + ", 1 to " + std::to_string(cache.H) + "] for a cache of shape " +
                   text(k->dimensions()));
  const int64_t T = shape[1], head_dim = shape[3];
  ffi::Error error = check_shape(who, "v_new", v_new.dimensions(), {cache.B, T, cache.K, head_dim}, "like k_new");
  if (error.failure()) return error;
  error = check_shape(who, "positions", positions.dimensions(), {cache.B, T}, "for the new tokens");
  if (error.failure()) return error;
  if (cache.S == 0 || T == 0) return ffi::Error::Success();

  static thread_local std::vector<char> chosen, chosen_of_row;
  static thread_local std::vector<int32_t> winner;
  chosen.clear();
  for (int64_t b = 0; b < cache.B; ++b) {
    choose(positions.typed_data() + b * T, T, cache.S, winner, chosen_of_row);
    chosen.insert(chosen.end(), chosen_of_row.begin(), chosen_of_row.end());
  }
  const char* written = chosen.data();
  const auto write_head = [&, written](int64_t i) {
    const int64_t b = i / cache.K, head = cache.head(b, i % cache.K);
    for (int64_t t = 0; t < T; ++t) {
      if (!written[b * T + t]) continue;
      const int64_t slot = positions.typed_data()[b * T + t] % cache.S;
      const int64_t from = ((b * T + t) * cache.K + i % cache.K) * head_dim, to = head * cache.S + slot;
      for (const auto& [news, rows, scales] : {std::tuple(&k_new, &k, &k_scale), std::tuple(&v_new, &v, &v_scale)})
        store_row(cache.type, news->typed_data() + from, head_dim, cache.H,
                  static_cast<char*>((*rows)->untyped_data()) + to * cache.H * bytes(cache.type),
                  scaled ? (*scales)->typed_data() + to : nullptr);
    }
  };
  const int64_t heads = cache.B * cache.K;
  if (heads * T * head_dim < kSerialWork)
    for (int64_t i = 0; i < heads; ++i) write_head(i);
  else
    parallel(pool, heads, write_head);
  return ffi::Error::Success();
}

struct Operands {
  const Floats &q, &k_scale, &v_scale;
  const ffi::AnyBuffer &k, &v;
  const Ints &q_positions, &k_positions, &q_segments, &k_segments;
  float* out;
  Cache cache;
  int64_t T, N, head_dim, window;

  int64_t group() const { return N / cache.K; }

  // All rows and slots of a head.
  AttentionTask task(int64_t b, int64_t k_head) const {
    const int64_t head = cache.head(b, k_head), first = (b * T * N + k_head * group()) * head_dim;
    const bool scaled = cache.type == CacheType::kInt8, segments = q_segments.element_count() > 0;
    AttentionTask task;
    task.q = q.typed_data() + first;
    task.out = out + first;
    task.token_stride = N * head_dim;
    task.group = group();
    task.head_dim = head_dim;
    task.row_begin = 0;
    task.row_end = T * group();
    task.type = cache.type;
    task.k = static_cast<const char*>(k.untyped_data()) + head * cache.head_bytes();
    task.v = static_cast<const char*>(v.untyped_data()) + head * cache.head_bytes();
    task.k_scale = scaled ? k_scale.typed_data() + head * cache.S : nullptr;
    task.v_scale = scaled ? v_scale.typed_data() + head * cache.S : nullptr;
    task.row_length = cache.H;
    task.slot_begin = 0;
    task.slot_end = cache.S;
    task.q_positions = q_positions.typed_data() + b * T;
    task.k_positions = k_positions.typed_data() + b * cache.S;
    task.q_segments = segments ? q_segments.typed_data() + b * T : nullptr;
    task.k_segments = segments ? k_segments.typed_data() + b * cache.S : nullptr;
    task.window = window;
    return task;
  }
};

ffi::Error check_queries(const std::string& who, Operands& o) {
  const Shape shape = o.q.dimensions();
  const Cache& cache = o.cache;
  if (shape.size() != 4 || shape[0] != cache.B || shape[3] < 1 || shape[3] > cache.H)
    return invalid(who + "q has shape " + text(shape) + ", expected [" + std::to_string(cache.B) + ", T, N, 1 to " +
                   std::to_string(cache.H) + "] for a cache of shape " + text(o.k.dimensions()));
  o.T = shape[1], o.N = shape[2], o.head_dim = shape[3];
  if (cache.K < 1 || o.N < 1 || o.N % cache.K)
    return invalid(who + std::to_string(o.N) + " query heads cannot share " + std::to_string(cache.K) +
                   " key-value heads");
  if (o.window < 0) return invalid(who + "window is " + std::to_string(o.window) + ", expected 0 (none) or more");
  ffi::Error error = check_shape(who, "q_positions", o.q_positions.dimensions(), {cache.B, o.T}, "like q");
  if (error.failure()) return error;
  error = check_shape(who, "k_positions", o.k_positions.dimensions(), {cache.B, cache.S}, "like the cache");
  if (error.failure() || (o.q_segments.element_count() == 0 && o.k_segments.element_count() == 0)) return error;
  error = check_shape(who, "q_segments", o.q_segments.dimensions(), {cache.B, o.T}, "like q");
  if (error.failure()) return error;
  return check_shape(who, "k_segments", o.k_segments.dimensions(), {cache.B, cache.S}, "like the cache");
}

// Runs all tasks: heads, blocks of query rows and, where these are too few for the threads, parts of the slots.
// Returns false if there was no memory.
bool attend_all(ffi::ThreadPool& pool, const Operands& o) {
  const int64_t heads = o.cache.B * o.cache.K, rows = o.T * o.group(), blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t tasks = heads * blocks, wanted = kTasksPerThread * std::max<int64_t>(1, pool.num_threads());

  // The slots in use, by row: looked up where queries are few and a scan of all slots would weigh on every head.
  static thread_local std::vector<AttentionTask> narrowed_here;
  std::vector<AttentionTask>& narrowed = narrowed_here;
  narrowed.clear();
  int64_t longest = o.cache.S;
  if (blocks == 1) {
    longest = 0;
    for (int64_t b = 0; b < o.cache.B; ++b) {
      narrowed.push_back(o.task(b, 0));
      narrow(narrowed.back());
      longest = std::max(longest, narrowed.back().slot_end - narrowed.back().slot_begin);
    }
  }
  const AttentionTask* ranges = narrowed.data();
  const int64_t work = heads * rows * longest * o.head_dim;
  const int64_t parts = blocks > 1 || tasks >= wanted / 2 || work < kSerialWork
                            ? 1
                            : std::clamp<int64_t>(longest / kSplitSlots, 1, (wanted + tasks - 1) / tasks);
  static thread_local Scratch kept_partials;
  const int64_t size = partial_size(std::min(rows, kBlockRows), o.head_dim);
  float* partials = parts > 1 ? kept_partials.get<float>(tasks * parts * size) : nullptr;
  if (parts > 1 && !partials) return false;

  std::atomic<bool> complete{true};
  const auto run = [&, ranges](int64_t chunk) {
    static thread_local Scratch scratch;
    const int64_t head = chunk / parts / blocks, part = chunk % parts;
    const int64_t block = blocks - 1 - chunk / parts % blocks;  // the last see the most: they first
    AttentionTask task = o.task(head / o.cache.K, head % o.cache.K);
    task.row_begin = block * kBlockRows;
    task.row_end = std::min(task.row_begin + kBlockRows, rows);
    if (blocks == 1) {
      const AttentionTask& range = ranges[head / o.cache.K];
      const int64_t slots = range.slot_end - range.slot_begin;
      task.slot_begin = range.slot_begin + slots * part / parts;
      task.slot_end = range.slot_begin + slots * (part + 1) / parts;
    }
    const int64_t room = (scratch_bytes(o.head_dim) + 63) / 64 * 64;
    char* memory = scratch.get<char>(room + (parts > 1 ? 0 : size * 4));
    if (!memory) {
      complete = false;
      return;
    }
    float* partial = parts > 1 ? partials + chunk * size : reinterpret_cast<float*>(memory + room);
    attend(task, memory, partial);
    if (parts == 1) finish(task, partial, 1);
  };
  if (work < kSerialWork)
    for (int64_t chunk = 0; chunk < tasks; ++chunk) run(chunk);
  else
    parallel(pool, tasks * parts, run);
  if (parts > 1 && complete)
    for (int64_t head = 0; head < heads; ++head)
      finish(o.task(head / o.cache.K, head % o.cache.K), partials + head * parts * size, parts);
  return complete;
}

ffi::Error attention(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer k, ffi::AnyBuffer v, Floats k_scale, Floats v_scale,
                     Ints q_positions, Ints k_positions, Ints q_segments, Ints k_segments, Ints layer,
                     ffi::Result<Floats> out, int64_t window) {
  const std::string who = "phi3_attention: ";
  Operands o{q,          k_scale,           v_scale, k, v, q_positions, k_positions, q_segments,
             k_segments, out->typed_data(), {},      0, 0, 0,           window};
  if (ffi::Error error = check_cache(who, k, v, k_scale, v_scale, layer, &o.cache); error.failure()) return error;
  if (ffi::Error error = check_queries(who, o); error.failure()) return error;
  ffi::Error error = check_shape(who, "the output", out->dimensions(), {o.cache.B, o.T, o.N, o.head_dim}, "like q");
  if (error.failure() || q.element_count() == 0) return error;
  if (attend_all(pool, o)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    who + "no memory for the sums of " + std::to_string(o.T) + " tokens");
}

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_attention, phi3::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<phi3::Floats>()         // q
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<phi3::Floats>()         // k_scale
                                  .Arg<phi3::Floats>()         // v_scale
                                  .Arg<phi3::Ints>()           // q_positions
                                  .Arg<phi3::Ints>()           // k_positions
                                  .Arg<phi3::Ints>()           // q_segments
                                  .Arg<phi3::Ints>()           // k_segments
                                  .Arg<phi3::Ints>()           // layer
                                  .Ret<phi3::Floats>()
                                  .Attr<int64_t>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_cache_write, phi3::cache_write,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // k
                                  .Arg<xla::ffi::AnyBuffer>()  // v
                                  .Arg<phi3::Floats>()         // k_scale
                                  .Arg<phi3::Floats>()         // v_scale
                                  .Arg<phi3::Floats>()         // k_new
                                  .Arg<phi3::Floats>()         // v_new
                                  .Arg<phi3::Ints>()           // positions
                                  .Arg<phi3::Ints>()           // layer
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<phi3::Floats>()
                                  .Ret<phi3::Floats>());
#pragma GCC visibility pop
