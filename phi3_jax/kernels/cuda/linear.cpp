// The product with integers, as XLA calls it: checks the operands, and chooses the kernel.
#include "linear.h"

#include <algorithm>
#include <string>

#include "ffi/check.h"
#include "launch.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;

// Fills in the product, or says what does not fit.
ffi::Error check(const ffi::Buffer<ffi::BF16>& x, const ffi::Buffer<ffi::U8>& values,
                 const ffi::Buffer<ffi::F16>& scales, const ffi::Buffer<ffi::F16>& mins, const ffi::AnyBuffer& y,
                 int64_t bits, bool gated, Product* p) {
  const std::string who = "phi3_cuda_linear: ";
  const Shape of_x = x.dimensions(), of_values = values.dimensions(), of_scales = scales.dimensions();
  if (bits != 4 && bits != 8) return invalid(who + "bits is " + std::to_string(bits) + ", expected 4 or 8");
  if (of_x.size() != 2 || of_values.size() != 2 || of_values[1] * 8 != of_x[1] * bits)
    return invalid(who + "x has shape " + text(of_x) + " and the integers of " + std::to_string(bits) + " bits " +
                   text(of_values) + ", expected [rows, inputs] and [outputs, inputs * bits / 8]");
  const int64_t inputs = of_x[1], outputs = of_values[0] / (gated ? 2 : 1);
  if (gated && of_values[0] % 16)
    return invalid(who + "gate and up have " + std::to_string(of_values[0]) + " rows, expected a multiple of 16");
  if (of_scales.size() != 2 || of_scales[0] != of_values[0] || of_scales[1] < 1)
    return invalid(who + "scales have shape " + text(of_scales) + ", expected [" +
                   std::to_string(of_values[0]) + ", groups]");
  const int64_t group = inputs / of_scales[1];
  if (group * of_scales[1] != inputs || (group != 32 && group != 64 && group != 128))
    return invalid(who + "scales have " + std::to_string(of_scales[1]) + " groups for " + std::to_string(inputs) +
                   " inputs, expected groups of 32, 64 or 128");
  const Shape of_mins = mins.dimensions(), of_y = y.dimensions();
  if (mins.element_count() && !(of_mins.size() == 2 && std::equal(of_mins.begin(), of_mins.end(), of_scales.begin())))
    return invalid(who + "mins have shape " + text(of_mins) + ", but scales " + text(of_scales));
  const bool float32 = y.element_type() == ffi::F32;
  if (of_y.size() != 2 || of_y[0] != of_x[0] || of_y[1] != outputs || (!float32 && y.element_type() != ffi::BF16))
    return invalid(who + "the result has shape " + text(of_y) + ", expected float32 or bfloat16 [rows, outputs]");
  if (std::max({of_x[0], inputs, outputs, of_values[0] * of_scales[1]}) > 1 << 30)
    return invalid(who + "more than 2^30 rows, inputs, outputs or scales");
  const auto halves = [](const ffi::Buffer<ffi::F16>& b) { return static_cast<const unsigned short*>(b.untyped_data()); };
  *p = {values.typed_data(),
        halves(scales),
        mins.element_count() ? halves(mins) : nullptr,
        static_cast<const unsigned short*>(x.untyped_data()),
        y.untyped_data(),
        static_cast<int>(of_x[0]),
        static_cast<int>(outputs),
        static_cast<int>(inputs),
        group == 32 ? 5 : group == 64 ? 6 : 7,
        float32,
        gated};
  return ffi::Error::Success();
}

unsigned blocks(int count, int each) { return static_cast<unsigned>((count + each - 1) / each); }

ffi::Error linear(Stream stream, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::U8> values, ffi::Buffer<ffi::F16> scales,
                  ffi::Buffer<ffi::F16> mins, ffi::Result<ffi::AnyBuffer> y, int64_t bits_given, bool gated) {
  Product p;
  if (ffi::Error error = check(x, values, scales, mins, *y, bits_given, gated, &p); error.failure()) return error;
  const int bits = static_cast<int>(bits_given);
  const std::string end = "_" + std::to_string(bits) + "_", with = p.mins ? "_mins" : "";
  const int integers = kWarps * few::kStages * few::stage_bytes(bits);
  const int shared = few::scale_bytes(p) * (p.mins ? 2 : 1) + integers;
  if (p.rows <= 32 && shared <= few::kMost) {  // with some twenty thousand inputs the scales are too many
    const int tiles = p.rows <= 8 ? 1 : p.rows <= 16 ? 2 : 4;
    const Grid grid = {p.rows ? blocks(p.outputs, gated ? 8 : kTile) : 0};
    return launch(stream, ("phi3_linear_few" + end + std::to_string(tiles) + with).c_str(), grid, kThreads,
                  static_cast<unsigned>(std::max(shared, few::sum_bytes(tiles))), p);
  }
  const int tiles = p.rows <= 64 ? 4 : 8;
  return launch(stream, ("phi3_linear_many" + end + std::to_string(tiles) + with).c_str(),
                {blocks(p.rows, many::rows(tiles)), blocks(p.outputs, many::kWide / (gated ? 2 : 1))}, kThreads,
                static_cast<unsigned>(many::kStages * many::stage_bytes(bits, tiles)), p);
}

}  // namespace
}  // namespace phi3

PHI3_HANDLER(phi3_cuda_linear, phi3::linear,
             phi3::bind()
                 .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                 .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                 .Arg<xla::ffi::Buffer<xla::ffi::F16>>()
                 .Arg<xla::ffi::Buffer<xla::ffi::F16>>()
                 .Ret<xla::ffi::AnyBuffer>()
                 .Attr<int64_t>("bits")
                 .Attr<bool>("gated"));
