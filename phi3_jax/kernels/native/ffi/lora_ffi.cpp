// The handler that XLA calls for rows that have different low-rank updates: it checks the operands and deals the rows
// out to XLA's threads. Axis letters as in lora.h; B rows of a batch, which may have several tokens each.
#include <algorithm>
#include <cstdint>
#include <string>

#include "ffi/check.h"
#include "ffi/parallel.h"
#include "lora/lora.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;
using Numbers = ffi::Buffer<ffi::F32>;

constexpr int64_t kSerialWork = 1 << 16;  // products that one thread does before another would have woken up

ffi::Error add_updates(ffi::ThreadPool pool, Numbers base, Numbers x, Numbers a, Numbers b, Numbers scaling,
                       ffi::Buffer<ffi::S32> layer, ffi::Result<Numbers> y) {
  const std::string who = "phi3_add_updates: ";
  const Shape from = x.dimensions(), to = y->dimensions(), of_a = a.dimensions(), of_b = b.dimensions(),
              of_scaling = scaling.dimensions();
  if (from.size() < 2 || to.size() != from.size() || !std::equal(from.begin(), from.end() - 1, to.begin()) ||
      !std::equal(to.begin(), to.end(), base.dimensions().begin(), base.dimensions().end()))
    return invalid(who + "x has shape " + text(from) + ", the base " + text(base.dimensions()) + " and the result " +
                   text(to) + ", they may differ in the last size only");
  if (y->untyped_data() != base.untyped_data())
    return invalid(who + "the result is not the base's own buffer; the call needs input_output_aliases for it");
  const int64_t B = from[0], I = from.back(), O = to.back();
  if (of_a.size() != 3 || of_b.size() != 3 || of_a[2] != I || of_b[2] != O || of_a[0] != of_b[0] || of_a[1] != of_b[1])
    return invalid(who + "a has shape " + text(of_a) + " and b " + text(of_b) + ", expected [layers, R, " +
                   std::to_string(I) + "] and [layers, R, " + std::to_string(O) + "]");
  const int64_t R = of_a[1];
  if (of_scaling.size() != 2 || of_scaling[0] != B || of_scaling[1] != R)
    return invalid(who + "the scaling has shape " + text(of_scaling) + ", expected [" + std::to_string(B) + ", " +
                   std::to_string(R) + "]");
  int64_t number;
  if (ffi::Error error = check_layer(who, layer, of_a[0], "a has", &number); error.failure()) return error;
  if (!y->element_count() || !I) return ffi::Error::Success();
  const float *own_a = a.typed_data() + number * R * I, *own_b = b.typed_data() + number * R * O;
  const int64_t rows = static_cast<int64_t>(y->element_count()) / O, tokens = rows / B;
  const int64_t together = std::max<int64_t>(1, kSerialWork / std::max<int64_t>(1, R * (I + O)));
  parallel(pool, (rows + together - 1) / together, [&](int64_t chunk) {
    for (int64_t r = chunk * together; r < std::min(rows, (chunk + 1) * together); ++r)
      add_update(x.typed_data() + r * I, own_a, own_b, scaling.typed_data() + r / tokens * R, I, O, R,
                 y->typed_data() + r * O);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_add_updates, phi3::add_updates,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<phi3::Numbers>()                    // base
                                  .Arg<phi3::Numbers>()                    // x
                                  .Arg<phi3::Numbers>()                    // a
                                  .Arg<phi3::Numbers>()                    // b
                                  .Arg<phi3::Numbers>()                    // scaling
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // layer
                                  .Ret<phi3::Numbers>());
#pragma GCC visibility pop
