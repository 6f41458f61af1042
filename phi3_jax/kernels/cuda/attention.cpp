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

// What a query sees, and where results go. `queries` are checked where they come from.
struct Call {
  const Any &k, &v;
  const Floats &k_scale, &v_scale;
  const Ints &q_positions, &k_positions, &q_segments, &k_segments, &layer;
  Any& out;
  Floats& partials;
  ffi::Buffer<ffi::S32>& done;
  int64_t window, splits;
};

// Fills in what attention needs but for the queries. They are [B, T, N, H] of the type of `out`.
ffi::Error fill(const std::string& who, const Call& c, AttentionOperands* o) {
  const Shape shape = c.out.dimensions(), cache = c.k.dimensions();
  const int64_t B = cache[1], K = cache[2], S = cache[3], T = shape[1], N = shape[2], H = shape[3];
  if (shape[0] != B || !K || N % K || H > cache[4] || !is_float(c.out))
    return invalid(who + "the result has shape " + text(shape) + ", expected float32 or bfloat16 [B, T, N, H] of a cache " +
                   text(cache));
  if (H != 64 && H != 96 && H != 128)
    return invalid(who + "there are kernels for heads of 64, 96 and 128 only, not " + std::to_string(H));
  if (c.window < 0 || c.window > INT32_MAX || c.splits < 1 || c.splits > 1024)
    return invalid(who + "window is " + std::to_string(c.window) + " and splits " + std::to_string(c.splits));
  const bool segments = c.q_segments.element_count() || c.k_segments.element_count();
  const auto check = [&](const char* name, const Ints& each, int64_t n, bool is_given) {
    return is_given ? check_shape(who, name, each.dimensions(), {B, n}) : ffi::Error::Success();
  };
  if (ffi::Error e = check("q_positions", c.q_positions, T, true); e.failure()) return e;
  if (ffi::Error e = check("k_positions", c.k_positions, S, true); e.failure()) return e;
  if (ffi::Error e = check("q_segments", c.q_segments, T, segments); e.failure()) return e;
  if (ffi::Error e = check("k_segments", c.k_segments, S, segments); e.failure()) return e;
  if (c.splits > 1) {
    const Shape partials = c.partials.dimensions();
    if (ffi::Error e = check_shape(who, "partials", partials, {B * N * T, c.splits, H + 2}); e.failure()) return e;
    if (ffi::Error e = check_shape(who, "done", c.done.dimensions(), {B * N * T}); e.failure()) return e;
  }
  const bool scaled = c.k.element_type() == ffi::S8;
  *o = {};
  o->out = c.out.untyped_data();
  o->k = c.k.untyped_data(), o->v = c.v.untyped_data();
  if (scaled) o->k_scale = c.k_scale.typed_data(), o->v_scale = c.v_scale.typed_data();
  o->q_positions = c.q_positions.typed_data(), o->k_positions = c.k_positions.typed_data();
  if (segments) o->q_segments = c.q_segments.typed_data(), o->k_segments = c.k_segments.typed_data();
  o->layer = c.layer.typed_data();
  o->partials = c.partials.typed_data(), o->done = reinterpret_cast<unsigned*>(c.done.typed_data());
  o->B = static_cast<int>(B), o->T = static_cast<int>(T), o->N = static_cast<int>(N), o->K = static_cast<int>(K);
  o->S = static_cast<int>(S), o->row_length = static_cast<int>(cache[4]);
  o->window = static_cast<int>(c.window), o->splits = static_cast<int>(c.splits);
  o->q_is_bf16 = c.out.element_type() == ffi::BF16;
  return ffi::Error::Success();
}

ffi::Error attend(Stream stream, const Call& c, const AttentionOperands& o) {
  const int rows = o.T * (o.N / o.K), H = static_cast<int>(c.out.dimensions()[3]);
  const bool few = rows <= kFewRows || c.k.element_type() == ffi::F32;
  const int together = !few ? kBlockRows : rows < 3 ? rows : 4, tiles = (rows + together - 1) / together;
  const Grid grid = {static_cast<unsigned>(tiles) * o.K, static_cast<unsigned>(o.splits), static_cast<unsigned>(o.B)};
  std::string kernel = std::string(few ? "attend_few_" : "attend_block_") + type_name(c.k) + "_" + std::to_string(H);
  if (few) kernel += "_" + std::to_string(together);
  const unsigned shared = few ? 0 : static_cast<unsigned>(PHI3_BLOCK_SHARED(H, o.S));
  return launch(stream, kernel.c_str(), grid, few ? kFewThreads : kBlockThreads, shared, o);
}

ffi::Error attention(Stream stream, Any q, Any k, Any v, Floats k_scale, Floats v_scale, Ints q_positions,
                     Ints k_positions, Ints q_segments, Ints k_segments, Ints layer, ffi::Result<Any> out,
                     ffi::Result<Floats> partials, ffi::Result<Ints> done, int64_t window, int64_t splits) {
  const std::string who = "phi3_cuda_attention: ";
  if (ffi::Error error = check_cache(who, k, v, k_scale, v_scale, layer); error.failure()) return error;
  const Shape shape = q.dimensions(), result = out->dimensions();
  if (shape.size() != 4 || !std::equal(shape.begin(), shape.end(), result.begin(), result.end()) ||
      q.element_type() != out->element_type())
    return invalid(who + "q has shape " + text(shape) + ", the result " + text(result) + "; they have to be alike");
  const Call call = {k,          v,     k_scale, v_scale,   q_positions, k_positions, q_segments,
                     k_segments, layer, *out,    *partials, *done,       window,      splits};
  AttentionOperands o;
  if (ffi::Error error = fill(who, call, &o); error.failure() || !q.element_count()) return error;
  o.q = q.untyped_data();
  if (splits > 1)
    if (ffi::Error e = launch(stream, "attend_clear", {1}, kWriteThreads, 0, o.done, o.B * o.N * o.T); e.failure())
      return e;
  return attend(stream, call, o);
}

// Whether outputs are the cache's own buffers.
bool in_place(const Any& k_in, const Any& v_in, const Floats& k_scale_in, const Floats& v_scale_in, const Any& k,
              const Any& v, const Floats& k_scale, const Floats& v_scale) {
  return k.untyped_data() == k_in.untyped_data() && v.untyped_data() == v_in.untyped_data() &&
         (k.element_type() != ffi::S8 || (k_scale.untyped_data() == k_scale_in.untyped_data() &&
                                          v_scale.untyped_data() == v_scale_in.untyped_data()));
}
const char* kNotInPlace = "an output is not its input's own buffer; the call needs input_output_aliases";

// Fills in what writing needs but for what is new.
WriteOperands writing(const Any& k, const Any& v, const Floats& k_scale, const Floats& v_scale, const Ints& positions,
                      const Ints& layer) {
  const Shape cache = k.dimensions(), tokens = positions.dimensions();
  WriteOperands o = {};
  o.k = k.untyped_data(), o.v = v.untyped_data();
  if (k.element_type() == ffi::S8)
    o.k_scale = static_cast<float*>(k_scale.untyped_data()), o.v_scale = static_cast<float*>(v_scale.untyped_data());
  o.positions = positions.typed_data(), o.layer = layer.typed_data();
  o.B = static_cast<int>(cache[1]), o.T = static_cast<int>(tokens[1]), o.K = static_cast<int>(cache[2]);
  o.S = static_cast<int>(cache[3]), o.row_length = static_cast<int>(cache[4]);
  return o;
}

ffi::Error write(Stream stream, const Any& k, const WriteOperands& o) {
  const Grid grid = {static_cast<unsigned>(o.T), static_cast<unsigned>(o.B)};
  return launch(stream, (std::string("cache_write_") + type_name(k)).c_str(), grid, kWriteThreads, 0, o);
}

ffi::Error cache_write(Stream stream, Any k_in, Any v_in, Floats k_scale_in, Floats v_scale_in, Any new_k, Any new_v,
                       Ints positions, Ints layer, ffi::Result<Any> k, ffi::Result<Any> v, ffi::Result<Floats> k_scale,
                       ffi::Result<Floats> v_scale) {
  const std::string who = "phi3_cuda_cache_write: ";
  if (ffi::Error error = check_cache(who, *k, *v, *k_scale, *v_scale, layer); error.failure()) return error;
  if (!in_place(k_in, v_in, k_scale_in, v_scale_in, *k, *v, *k_scale, *v_scale)) return invalid(who + kNotInPlace);
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
  WriteOperands o = writing(*k, *v, *k_scale, *v_scale, positions, layer);
  o.new_k = new_k.untyped_data(), o.new_v = new_v.untyped_data();
  o.H = static_cast<int>(H), o.token_stride = static_cast<int>(K * H);
  o.new_is_bf16 = new_k.element_type() == ffi::BF16;
  return write(stream, *k, o);
}

// Both, in two launches: qkv is what the product gave, not rotated yet.
ffi::Error attend_new(Stream stream, Any k_in, Any v_in, Floats k_scale_in, Floats v_scale_in, Any qkv, Any cos,
                      Any sin, Ints q_positions, Ints k_positions, Ints q_segments, Ints k_segments, Ints layer,
                      ffi::Result<Any> k, ffi::Result<Any> v, ffi::Result<Floats> k_scale, ffi::Result<Floats> v_scale,
                      ffi::Result<Any> out, ffi::Result<Any> q, ffi::Result<Floats> partials, ffi::Result<Ints> done,
                      int64_t window, int64_t splits) {
  const std::string who = "phi3_cuda_attend_new: ";
  if (ffi::Error error = check_cache(who, *k, *v, *k_scale, *v_scale, layer); error.failure()) return error;
  if (!in_place(k_in, v_in, k_scale_in, v_scale_in, *k, *v, *k_scale, *v_scale)) return invalid(who + kNotInPlace);
  const Call call = {*k,         *v,    *k_scale, *v_scale,  q_positions, k_positions, q_segments,
                     k_segments, layer, *out,     *partials, *done,       window,      splits};
  AttentionOperands o;
  if (out->dimensions().size() != 4) return invalid(who + "the result has shape " + text(out->dimensions()));
  if (ffi::Error error = fill(who, call, &o); error.failure()) return error;
  const Shape shape = out->dimensions(), angles = cos.dimensions();
  const int64_t B = o.B, T = o.T, N = o.N, K = o.K, H = shape[3];
  if (ffi::Error e = check_shape(who, "qkv", qkv.dimensions(), {B, T, N + 2 * K, H}); e.failure()) return e;
  if (ffi::Error e = check_shape(who, "q", q->dimensions(), {B, T, N, H}); e.failure()) return e;
  if (angles.size() != 3 || 2 * angles[2] > H)
    return invalid(who + "cos has shape " + text(angles) + ", expected [B, T, half of a head at most]");
  if (ffi::Error e = check_shape(who, "cos", angles, {B, T, angles[2]}); e.failure()) return e;
  if (ffi::Error e = check_shape(who, "sin", sin.dimensions(), {B, T, angles[2]}); e.failure()) return e;
  const ffi::DataType type = out->element_type();
  if (qkv.element_type() != type || cos.element_type() != type || sin.element_type() != type ||
      q->element_type() != type)
    return invalid(who + "qkv, cos, sin and the results have to be of one type");
  if (!o.S || !qkv.element_count()) return ffi::Error::Success();

  WriteOperands w = writing(*k, *v, *k_scale, *v_scale, q_positions, layer);
  w.new_is_bf16 = type == ffi::BF16;
  const char* const first = static_cast<const char*>(qkv.untyped_data());
  const int64_t head = H * (w.new_is_bf16 ? 2 : 4);
  w.new_q = first, w.new_k = first + N * head, w.new_v = first + (N + K) * head;
  w.q = q->untyped_data(), w.cos = cos.untyped_data(), w.sin = sin.untyped_data();
  w.N = o.N, w.H = static_cast<int>(H), w.R = static_cast<int>(angles[2]);
  w.token_stride = static_cast<int>((N + 2 * K) * H);
  if (splits > 1) w.zeros = o.done, w.zeros_count = static_cast<int>(B * N * T);
  if (ffi::Error error = write(stream, *k, w); error.failure()) return error;
  o.q = q->untyped_data();
  return attend(stream, call, o);
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
                 .Ret<phi3::Ints>()    // done
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

PHI3_HANDLER(phi3_cuda_attend_new, phi3::attend_new,
             phi3::bind()
                 .Arg<xla::ffi::AnyBuffer>()  // k
                 .Arg<xla::ffi::AnyBuffer>()  // v
                 .Arg<phi3::Floats>()         // k_scale
                 .Arg<phi3::Floats>()         // v_scale
                 .Arg<xla::ffi::AnyBuffer>()  // qkv
                 .Arg<xla::ffi::AnyBuffer>()  // cos
                 .Arg<xla::ffi::AnyBuffer>()  // sin
                 .Arg<phi3::Ints>()           // q_positions
                 .Arg<phi3::Ints>()           // k_positions
                 .Arg<phi3::Ints>()           // q_segments
                 .Arg<phi3::Ints>()           // k_segments
                 .Arg<phi3::Ints>()           // layer
                 .Ret<xla::ffi::AnyBuffer>()  // k
                 .Ret<xla::ffi::AnyBuffer>()  // v
                 .Ret<phi3::Floats>()         // k_scale
                 .Ret<phi3::Floats>()         // v_scale
                 .Ret<xla::ffi::AnyBuffer>()  // the result
                 .Ret<xla::ffi::AnyBuffer>()  // the queries, rotated
                 .Ret<phi3::Floats>()         // partials
                 .Ret<phi3::Ints>()           // done
                 .Attr<int64_t>("window")
                 .Attr<int64_t>("splits"));
