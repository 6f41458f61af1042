// The handlers that XLA calls for y = x W^T: they check the operands and deal the panels out to XLA's threads.
#include <algorithm>
#include <atomic>
#include <string>

#include "ffi/check.h"
#include "ffi/parallel.h"
#include "linear/panels.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kRowBlock = 128;        // their rounded inputs stay in L2 while all panels pass
constexpr int64_t kChunkWork = 64 << 10;  // bytes of weights: about 3 us for a few rows, beside 0.3 us to wake a thread
constexpr int64_t kRoundingWork = 1 << 16;  // inputs that one thread rounds as fast as several would

// The sizes of one product, out of the operands that both handlers have.
struct Sizes {
  int64_t rows, inputs, outputs, layer;
};

ffi::Error check(const char* name, const ffi::Buffer<ffi::F32>& x, Shape weights, int64_t panel_width,
                 const ffi::Buffer<ffi::S32>& layer, ffi::Buffer<ffi::F32>& y, Sizes* sizes) {
  const Shape from = x.dimensions(), to = y.dimensions();
  const std::string who = std::string(name) + ": ";
  if (from.size() == 0 || to.size() != from.size() || !std::equal(from.begin(), from.end() - 1, to.begin()))
    return invalid(who + "x has shape " + text(from) + " and y " + text(to) +
                   ", they may differ in the last size only");
  sizes->inputs = from.back();
  sizes->outputs = to.back();
  if (sizes->inputs < 1 || sizes->outputs < 1)
    return invalid(who + "x has " + std::to_string(sizes->inputs) + " inputs and y " + std::to_string(sizes->outputs) +
                   " outputs, at least 1 of each is needed");
  sizes->rows = static_cast<int64_t>(x.element_count()) / sizes->inputs;
  if (weights.size() != 4 || weights[3] != 128)
    return invalid(who + "the weights have shape " + text(weights) + ", expected [layers, panels, steps, 128]");
  const int64_t panels = (sizes->outputs + panel_width - 1) / panel_width;
  if (weights[1] != panels)
    return invalid(who + "the weights have " + std::to_string(weights[1]) + " panels, but y has " +
                   std::to_string(sizes->outputs) + " outputs, which take " + std::to_string(panels));
  return check_layer(who, layer, weights[0], "the weights have", &sizes->layer);
}

// Calls prepare(row) for all rows of a block and then part(first row, last row, first panel, last panel) for all parts,
// each with room for its rows of one panel. Returns false if there was no memory for that.
template <class Prepare, class Part>
bool for_all_parts(ffi::ThreadPool& pool, const Sizes& sizes, int64_t rows, int64_t panels, int64_t panel_width,
                   int64_t panel_bytes, const Prepare& prepare, const Part& part) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t together = std::max<int64_t>(1, kRoundingWork / sizes.inputs);
  parallel(pool, (rows + together - 1) / together, [&](int64_t chunk) {
    for (int64_t r = chunk * together; r < std::min(rows, (chunk + 1) * together); ++r) prepare(r);
  });
  // Several parts for each thread, which may get unequal shares of the processor; but none too small to pay for itself.
  const int64_t work = panels * panel_bytes * (1 + rows / 8);
  const int64_t wanted = std::clamp<int64_t>(work / kChunkWork, 1, threads * 8);
  const int64_t run = (panels + wanted - 1) / wanted, runs = (panels + run - 1) / run;
  // Rows are only split where there are too few panels for the threads: their parts read the same weights.
  const int64_t row_parts =
      runs >= std::min(wanted, threads * 2) ? 1 : std::clamp<int64_t>(wanted / runs, 1, (rows + 23) / 24);
  const int64_t tall = (rows + row_parts - 1) / row_parts;
  std::atomic<bool> complete{true};
  parallel(pool, row_parts * runs, [&](int64_t chunk) {
    static thread_local Scratch scratch;
    float* edge = scratch.get<float>(tall * panel_width);
    if (!edge) {
      complete = false;
      return;
    }
    const int64_t row = chunk / runs * tall, panel = chunk % runs * run;
    if (row < rows) part(row, std::min(rows, row + tall), panel, std::min(panels, panel + run), edge);
  });
  return complete;
}

ffi::Error no_memory(const char* name, int64_t rows) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    std::string(name) + ": no memory for " + std::to_string(rows) + " rounded rows");
}

ffi::Error linear_bf16(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> weights,
                       ffi::Buffer<ffi::S32> layer, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const char* const name = "phi3_linear_bf16";
  Sizes sizes;
  const Shape shape = weights.dimensions();
  if (ffi::Error error = check(name, x, shape, kBf16Panel, layer, *y, &sizes); error.failure()) return error;
  Bf16Matrix matrix = {reinterpret_cast<const uint16_t*>(weights.untyped_data()), sizes.outputs, sizes.inputs};
  if (shape[2] != matrix.pairs())
    return invalid(std::string(name) + ": the weights have " + std::to_string(shape[2]) +
                   " pairs of inputs, but x has " + std::to_string(sizes.inputs) + " inputs, which make " +
                   std::to_string(matrix.pairs()));
  const int64_t row_bytes = matrix.x_stride() * kRoundedBytes, panel_elements = matrix.pairs() * 2 * kBf16Panel;
  matrix.panels += sizes.layer * matrix.count() * panel_elements;
  static thread_local Scratch scratch;
  for (int64_t begin = 0; begin < sizes.rows; begin += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, sizes.rows - begin);
    char* rounded = scratch.get<char>(rows * row_bytes);
    if (!rounded) return no_memory(name, rows);
    const float* from = x.typed_data() + begin * sizes.inputs;
    float* to = y->typed_data() + begin * sizes.outputs;
    const bool complete = for_all_parts(
        pool, sizes, rows, matrix.count(), kBf16Panel, panel_elements * 2,
        [&](int64_t r) { round_row(from + r * sizes.inputs, sizes.inputs, rounded + r * row_bytes); },
        [&](int64_t row, int64_t last_row, int64_t panel, int64_t last_panel, float* edge) {
          bf16_panels(matrix, rounded, row, last_row, panel, last_panel, edge, to);
        });
    if (!complete) return no_memory(name, rows);
  }
  return ffi::Error::Success();
}

// Fills in the weights' layer, or says what does not fit.
ffi::Error check_quantized(const char* name, const ffi::Buffer<ffi::U8>& data, const ffi::Buffer<ffi::F16>& scales,
                           const ffi::Buffer<ffi::F16>& mins, int64_t bits, const Sizes& sizes,
                           QuantizedMatrix* matrix) {
  const std::string who = std::string(name) + ": ";
  if (bits != 4 && bits != 8) return invalid(who + "bits is " + std::to_string(bits) + ", expected 4 or 8");
  const Shape shape = data.dimensions(), scale_shape = scales.dimensions();
  const int64_t inputs = shape[2] * (32 / bits);
  if (scale_shape.size() != 4 || scale_shape[0] != shape[0] || scale_shape[1] != shape[1] || scale_shape[2] < 1 ||
      scale_shape[3] != kQuantizedPanel)
    return invalid(who + "scales have shape " + text(scale_shape) + ", expected [" + std::to_string(shape[0]) + ", " +
                   std::to_string(shape[1]) + ", groups, 32] as the weights have shape " + text(shape));
  const int64_t group = inputs / scale_shape[2];
  if (group * scale_shape[2] != inputs || (group != 32 && group != 64 && group != 128))
    return invalid(who + "scales have " + std::to_string(scale_shape[2]) + " groups for " + std::to_string(inputs) +
                   " inputs of the weights, expected groups of 32, 64 or 128");
  *matrix = {
      {data.typed_data(), reinterpret_cast<const uint16_t*>(scales.untyped_data()), nullptr, static_cast<int>(bits)},
      sizes.outputs,
      sizes.inputs,
      group};
  if (matrix->groups() != scale_shape[2])
    return invalid(who + "the weights have " + std::to_string(inputs) + " inputs, but x has " +
                   std::to_string(sizes.inputs) + ", which make " + std::to_string(matrix->groups() * group));
  if (mins.element_count() != 0) {
    const Shape min_shape = mins.dimensions();
    if (min_shape.size() != 4 || !std::equal(min_shape.begin(), min_shape.end(), scale_shape.begin()))
      return invalid(who + "mins have shape " + text(min_shape) + ", but scales " + text(scale_shape));
    matrix->layer.mins = reinterpret_cast<const uint16_t*>(mins.untyped_data());
  }
  const int64_t panel = sizes.layer * matrix->count(), scale = panel * matrix->groups() * kQuantizedPanel;
  matrix->layer.data += panel * matrix->panel_bytes();
  matrix->layer.scales += scale;
  if (matrix->layer.mins) matrix->layer.mins += scale;
  return ffi::Error::Success();
}

ffi::Error linear_quantized(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> data,
                            ffi::Buffer<ffi::F16> scales, ffi::Buffer<ffi::F16> mins, ffi::Buffer<ffi::S32> layer,
                            ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t bits) {
  const char* const name = "phi3_linear_quantized";
  Sizes sizes;
  QuantizedMatrix matrix;
  if (ffi::Error error = check(name, x, data.dimensions(), kQuantizedPanel, layer, *y, &sizes); error.failure())
    return error;
  if (ffi::Error error = check_quantized(name, data, scales, mins, bits, sizes, &matrix); error.failure()) return error;
  static thread_local Scratch integers, numbers;
  for (int64_t begin = 0; begin < sizes.rows; begin += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, sizes.rows - begin), scales_of_rows = rows * matrix.groups();
    int8_t* q = integers.get<int8_t>(rows * matrix.x_stride());
    float* of_groups = numbers.get<float>(3 * scales_of_rows);
    if (!q || !of_groups) return no_memory(name, rows);
    const QuantizedRows quantized = {q,
                                     of_groups,
                                     of_groups + scales_of_rows,
                                     reinterpret_cast<int32_t*>(of_groups + 2 * scales_of_rows),
                                     matrix.x_stride(),
                                     matrix.groups(),
                                     matrix.group};
    const float* from = x.typed_data() + begin * sizes.inputs;
    float* to = y->typed_data() + begin * sizes.outputs;
    const bool complete = for_all_parts(
        pool, sizes, rows, matrix.count(), kQuantizedPanel, matrix.panel_bytes(),
        [&](int64_t r) {
          quantize_row(from + r * sizes.inputs, sizes.inputs, matrix.layer.bits, matrix.layer.mins, quantized, r);
        },
        [&](int64_t row, int64_t last_row, int64_t panel, int64_t last_panel, float* edge) {
          quantized_panels(matrix, quantized, row, last_row, panel, last_panel, edge, to);
        });
    if (!complete) return no_memory(name, rows);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_linear_bf16, phi3::linear_bf16,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_linear_quantized, phi3::linear_quantized,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits"));
#pragma GCC visibility pop
