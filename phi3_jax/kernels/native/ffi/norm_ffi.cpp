// The handler that XLA calls for RMSNorm: it checks the operands and deals the rows out to XLA's threads.
#include <algorithm>
#include <cstdint>
#include <string>

#include "ffi/check.h"
#include "ffi/parallel.h"
#include "norm/norm.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kSerialWork = 1 << 16;  // numbers that one thread does before another would have woken up

template <class Row, class Weight>
void all_rows(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const Weight* weight, int64_t D, float eps,
              ffi::AnyBuffer& out) {
  const int64_t rows = static_cast<int64_t>(x.element_count()) / D, together = std::max<int64_t>(1, kSerialWork / D);
  const Row* from = static_cast<const Row*>(x.untyped_data());
  Row* to = static_cast<Row*>(out.untyped_data());
  parallel(pool, (rows + together - 1) / together, [=](int64_t chunk) {
    for (int64_t r = chunk * together; r < std::min(rows, (chunk + 1) * together); ++r)
      rms_norm_row(from + r * D, weight, D, eps, to + r * D);
  });
}

template <class Row>
void with_weight(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight, int64_t layer, int64_t D,
                 float eps, ffi::AnyBuffer& out) {
  if (weight.element_type() == ffi::F32)
    all_rows<Row>(pool, x, static_cast<const float*>(weight.untyped_data()) + layer * D, D, eps, out);
  else
    all_rows<Row>(pool, x, static_cast<const uint16_t*>(weight.untyped_data()) + layer * D, D, eps, out);
}

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Buffer<ffi::S32> layer,
                    ffi::Buffer<ffi::F32> eps_in, ffi::Result<ffi::AnyBuffer> out) {
  const std::string who = "phi3_rms_norm: ";
  const Shape shape = x.dimensions(), weights = weight.dimensions(), to = out->dimensions();
  for (const auto type : {x.element_type(), weight.element_type()})
    if (type != ffi::F32 && type != ffi::BF16) return invalid(who + "x and the weights are float32 or bfloat16");
  if (out->element_type() != x.element_type() || !std::equal(shape.begin(), shape.end(), to.begin(), to.end()))
    return invalid(who + "x has shape " + text(shape) + " and the result " + text(to) +
                   ", they must be alike, in type, too");
  if (shape.size() == 0 || shape.back() < 1) return invalid(who + "x has shape " + text(shape) + ", expected [..., D]");
  const int64_t D = shape.back();
  if (weights.size() != 2 || weights[1] != D)
    return invalid(who + "the weights have shape " + text(weights) + ", expected [layers, " + std::to_string(D) + "]");
  if (eps_in.element_count() != 1)
    return invalid(who + "eps has shape " + text(eps_in.dimensions()) + ", expected one number");
  const float eps = *eps_in.typed_data();
  int64_t number;
  if (ffi::Error error = check_layer(who, layer, weights[0], "the weights have", &number); error.failure())
    return error;
  if (x.element_type() == ffi::F32)
    with_weight<float>(pool, x, weight, number, D, eps, *out);
  else
    with_weight<uint16_t>(pool, x, weight, number, D, eps, *out);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_rms_norm, phi3::rms_norm,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Arg<xla::ffi::AnyBuffer>()              // weight
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // layer
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // eps
                                  .Ret<xla::ffi::AnyBuffer>());
#pragma GCC visibility pop
