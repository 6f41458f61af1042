// The handler that XLA calls for attention over the key-value cache: it checks the operands and deals the work out to
// XLA's threads. Axis letters as in attention.h.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "ffi/cache.h"
#include "ffi/check.h"
#include "ffi/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kSplitSlots = 256;    // fewer slots are not worth merging for
constexpr int64_t kTasksPerThread = 4;  // threads get unequal shares of the processor

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
    const int64_t block = blocks - 1 - chunk / parts % blocks;  // the last sees the most keys, so it comes first
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
#pragma GCC visibility pop
