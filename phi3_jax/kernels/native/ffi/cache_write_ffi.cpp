// The handler that XLA calls for writing to the key-value cache: it checks the operands and deals the heads out to
// XLA's threads. Axis letters as in attention.h.
#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "ffi/cache.h"
#include "ffi/check.h"
#include "ffi/parallel.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;

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

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
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
