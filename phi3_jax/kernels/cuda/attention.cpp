// Attention and writing to the cache, as XLA calls them: checks the operands, and chooses the kernel. Axis letters as in
// attention.h.
#include "attention.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "ffi/check.h"
#include "launch.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

ffi::Error check_shape(const std::string& who, const char* name, Shape found, std::initializer_list<int64_t> expected) {
  const Shape wanted(expected.begin(), expected.size());
  if (std::equal(found.begin(), found.end(), wanted.begin(), wanted.end())) return ffi::Error::Success();
  return invalid(who + name + " has shape " + text(found) + ", expected " + text(wanted));
}

// The name of the cache's type in kernels' names; nullptr if they do not know it.
const char* type_name(const Any& buffer) {
  const ffi::DataType type = buffer.element_type();
  return type == ffi::F32 ? "float" : type == ffi::BF16 ? "bf16" : type == ffi::S8 ? "int8" : nullptr;
}
bool is_float(const Any& buffer) { return buffer.element_type() == ffi::F32 || buffer.element_type() == ffi::BF16; }

ffi::Error check_cache(const std::string& who, const Any& k, const Any& v, const Floats& k_scale, const Floats& v_scale,
                       const Ints& layer) {
  const Shape shape = k.dimensions();
  if (!type_name(k)) return invalid(who + "the cache's type is none of float32, bfloat16 and int8");
  if (v.element_type() != k.element_type()) return invalid(who + "k and v have different types");
  if (shape.size() != 5 || !std::equal(shape.begin(), shape.end(), v.dimensions().begin(), v.dimensions().end()))
    return invalid(who + "k has shape " + text(shape) + " and v " + text(v.dimensions()) +
                   ", expected [L, B, K, S, H] twice");
  if (shape[1] > 65535 || shape[2] > 4096 || shape[3] > 1 << 20)
    return invalid(who + "k has shape " + text(shape) + ", but at most 65535 rows, 4096 heads and 2^20 slots are known");
  if (shape[4] % 16)
    return invalid(who + "k has shape " + text(shape) + "; heads are read in sixteens");
  for (const auto& [name, scales] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    ffi::Error error = k.element_type() == ffi::S8
                           ? check_shape(who, name, scales->dimensions(), {shape[0], shape[1], shape[2], shape[3]})
                           : check_shape(who, name, scales->dimensions(), {0});
    if (error.failure()) return error;
  }
  return layer.element_count() == 1 ? ffi::Error::Success()
                                    : invalid(who + "layer has shape " + text(layer.dimensions()) + ", expected []");
}

ffi::Error attention(Stream stream, Any q, Any k, Any v, Floats k_scale, Floats v_scale, Ints q_positions,
                     Ints k_positions, Ints q_segments, Ints k_segments, Ints layer, ffi::Result<Any> out,
                     ffi::Result<Floats> partials, int64_t window, int64_t splits) {
  const std::string who = "phi3_cuda_attention: ";
  if (ffi::Error error = check_cache(who, k, v, k_scale, v_scale, layer); error.failure()) return error;
  const Shape shape = q.dimensions(), cache = k.dimensions();
  const int64_t B = cache[1], K = cache[2], S = cache[3];
  if (shape.size() != 4 || shape[0] != B || shape[2] % std::max<int64_t>(K, 1) || shape[3] > cache[4] || !is_float(q))
    return invalid(who + "q has shape " + text(shape) + ", expected float32 or bfloat16 [" + std::to_string(B) +
                   ", T, a multiple of " + std::to_string(K) + ", at most " + std::to_string(cache[4]) + "]");
  const int64_t T = shape[1], N = shape[2], H = shape[3], rows = K ? T * (N / K) : 0;
  if (H != 64 && H != 96 && H != 128)
    return invalid(who + "q has shape " + text(shape) + ", but there are kernels for heads of 64, 96 and 128 only");
  if (window < 0 || window > INT32_MAX || splits < 1 || splits > 1024)
    return invalid(who + "window is " + std::to_string(window) + " and splits " + std::to_string(splits));
  for (const auto& [name, each, slots] : {std::tuple("q_positions", &q_positions, T), {"k_positions", &k_positions, S}})
    if (ffi::Error error = check_shape(who, name, each->dimensions(), {B, slots}); error.failure()) return error;
  const bool segments = q_segments.element_count() || k_segments.element_count();
  for (const auto& [name, each, slots] : {std::tuple("q_segments", &q_segments, T), {"k_segments", &k_segments, S}})
    if (segments)
      if (ffi::Error error = check_shape(who, name, each->dimensions(), {B, slots}); error.failure()) return error;
  if (out->element_type() != q.element_type()) return invalid(who + "the result has another type than q");
  if (ffi::Error e = check_shape(who, "the result", out->dimensions(), {B, T, N, H}); e.failure()) return e;
  if (splits > 1)
    if (ffi::Error e = check_shape(who, "partials", partials->dimensions(), {B * K * rows, splits, H + 2}); e.failure())
      return e;
  if (!q.element_count()) return ffi::Error::Success();

  const bool scaled = k.element_type() == ffi::S8;
  const AttentionOperands o = {q.untyped_data(),
                               out->untyped_data(),
                               k.untyped_data(),
                               v.untyped_data(),
                               scaled ? k_scale.typed_data() : nullptr,
                               scaled ? v_scale.typed_data() : nullptr,
                               q_positions.typed_data(),
                               k_positions.typed_data(),
                               segments ? q_segments.typed_data() : nullptr,
                               segments ? k_segments.typed_data() : nullptr,
                               layer.typed_data(),
                               partials->typed_data(),
                               static_cast<int>(B),
                               static_cast<int>(T),
                               static_cast<int>(N),
                               static_cast<int>(K),
                               static_cast<int>(S),
                               static_cast<int>(cache[4]),
                               static_cast<int>(window),
                               static_cast<int>(splits),
                               q.element_type() == ffi::BF16};
  const bool few = rows <= kFewRows || k.element_type() == ffi::F32;
  const int64_t together = !few ? kBlockRows : rows < 3 ? rows : 4, tiles = (rows + together - 1) / together;
  const Grid grid = {static_cast<unsigned>(tiles * K), static_cast<unsigned>(splits), static_cast<unsigned>(B)};
  std::string kernel = std::string(few ? "attend_few_" : "attend_block_") + type_name(k) + "_" + std::to_string(H);
  if (few) kernel += "_" + std::to_string(together);
  const unsigned shared = few ? 0 : static_cast<unsigned>(PHI3_BLOCK_SHARED(H, S));
  ffi::Error error = launch(stream, kernel.c_str(), grid, few ? kFewThreads : kBlockThreads, shared, o);
  if (splits == 1 || error.failure()) return error;
  return launch(stream, "attend_merge", {static_cast<unsigned>(B * K * rows)}, kMergeThreads, 0, o,
                static_cast<int>(H));
}

ffi::Error cache_write(Stream stream, Any k_in, Any v_in, Floats k_scale_in, Floats v_scale_in, Any new_k, Any new_v,
                       Ints positions, Ints layer, ffi::Result<Any> k, ffi::Result<Any> v, ffi::Result<Floats> k_scale,
                       ffi::Result<Floats> v_scale) {
  const std::string who = "phi3_cuda_cache_write: ";
  if (ffi::Error error = check_cache(who, *k, *v, *k_scale, *v_scale, layer); error.failure()) return error;
  const bool scaled = k->element_type() == ffi::S8;
  if (k->untyped_data() != k_in.untyped_data() || v->untyped_data() != v_in.untyped_data() ||
      (scaled &&
       (k_scale->untyped_data() != k_scale_in.untyped_data() || v_scale->untyped_data() != v_scale_in.untyped_data())))
    return invalid(who + "an output is not its input's own buffer; the call needs input_output_aliases");
  const Shape shape = new_k.dimensions(), cache = k->dimensions();
  const int64_t B = cache[1], K = cache[2], S = cache[3];
  if (shape.size() != 4 || shape[0] != B || shape[2] != K || shape[3] > std::min<int64_t>(cache[4], kLargestHead) ||
      !is_float(new_k) || new_v.element_type() != new_k.element_type())
    return invalid(who + "new_k has shape " + text(shape) + ", expected float32 or bfloat16 [B, T, K, H] of a cache " +
                   text(cache));
  const int64_t T = shape[1], H = shape[3];
  if (ffi::Error e = check_shape(who, "new_v", new_v.dimensions(), {B, T, K, H}); e.failure()) return e;
  if (ffi::Error e = check_shape(who, "positions", positions.dimensions(), {B, T}); e.failure()) return e;
  if (!S || !new_k.element_count()) return ffi::Error::Success();

  WriteOperands o = {};
  o.k = k->untyped_data(), o.v = v->untyped_data();
  if (scaled) o.k_scale = k_scale->typed_data(), o.v_scale = v_scale->typed_data();
  o.new_k = new_k.untyped_data(), o.new_v = new_v.untyped_data();
  o.positions = positions.typed_data(), o.layer = layer.typed_data();
  o.B = static_cast<int>(B), o.T = static_cast<int>(T), o.K = static_cast<int>(K), o.S = static_cast<int>(S);
  o.H = static_cast<int>(H), o.row_length = static_cast<int>(cache[4]), o.token_stride = static_cast<int>(K * H);
  o.new_is_bf16 = new_k.element_type() == ffi::BF16;
  const Grid grid = {static_cast<unsigned>(T), static_cast<unsigned>(B)};
  return launch(stream, (std::string("cache_write_") + type_name(*k)).c_str(), grid, kWriteThreads, 0, o);
}

}  // namespace
}  // namespace phi3

PHI3_HANDLER(phi3_cuda_attention, phi3::attention,
             phi3::bind()
                 .Arg<xla::ffi::AnyBuffer>()  // q
                 .Arg<xla::ffi::AnyBuffer>()  // k
                 .Arg<xla::ffi::AnyBuffer>()  // v
                 .Arg<phi3::Floats>()         // k_scale
                 .Arg<phi3::Floats>()         // v_scale
                 .Arg<phi3::Ints>()           // q_positions
                 .Arg<phi3::Ints>()           // k_positions
                 .Arg<phi3::Ints>()           // q_segments
                 .Arg<phi3::Ints>()           // k_segments
                 .Arg<phi3::Ints>()           // layer
                 .Ret<xla::ffi::AnyBuffer>()
                 .Ret<phi3::Floats>()  // partials
                 .Attr<int64_t>("window")
                 .Attr<int64_t>("splits"));

PHI3_HANDLER(phi3_cuda_cache_write, phi3::cache_write,
             phi3::bind()
                 .Arg<xla::ffi::AnyBuffer>()  // k
                 .Arg<xla::ffi::AnyBuffer>()  // v
                 .Arg<phi3::Floats>()         // k_scale
                 .Arg<phi3::Floats>()         // v_scale
                 .Arg<xla::ffi::AnyBuffer>()  // new_k
                 .Arg<xla::ffi::AnyBuffer>()  // new_v
                 .Arg<phi3::Ints>()           // positions
                 .Arg<phi3::Ints>()           // layer
                 .Ret<xla::ffi::AnyBuffer>()
                 .Ret<xla::ffi::AnyBuffer>()
                 .Ret<phi3::Floats>()
                 .Ret<phi3::Floats>());
