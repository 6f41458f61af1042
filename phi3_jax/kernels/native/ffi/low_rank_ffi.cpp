// The handler that XLA calls for y = base + scaling * (x A^T) B^T, an adapter's update of a few rows. A and B are read in
// place: XLA's own products would first copy the layer out of the stack, on one thread.
#include <algorithm>
#include <string>

#include "ffi/check.h"
#include "ffi/parallel.h"
#include "linear/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunkWork = 64 << 10;  // bytes that pay for waking a thread, as in linear_ffi.cpp

float dot(const float* p, const float* q, int64_t n) {
  constexpr int kLanes = V::kLanes, kSums = 4;
  V::Floats sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int s = 0; s < kSums; ++s)
      sums[s] = V::add_product(sums[s], V::load(p + i + s * kLanes), V::load(q + i + s * kLanes));
  for (; i + kLanes <= n; i += kLanes) sums[0] = V::add_product(sums[0], V::load(p + i), V::load(q + i));
  const V::Floats one = V::set(1.0f);
  float parts[kLanes];
  V::store(parts, V::add_product(V::add_product(sums[0], one, sums[1]), one, V::add_product(sums[2], one, sums[3])));
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  for (; i < n; ++i) parts[0] += p[i] * q[i];
  return parts[0];
}

// Calls f(first, last) for parts of [0, count), of which each element stands for so many bytes.
template <class F>
void in_parts(ffi::ThreadPool& pool, int64_t count, int64_t bytes, const F& f) {
  const int64_t most = std::max<int64_t>(1, pool.num_threads()) * 4;
  const int64_t parts = std::clamp<int64_t>(count * bytes / kChunkWork, 1, std::min(most, std::max<int64_t>(1, count)));
  parallel(pool, parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
}

ffi::Error low_rank(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> base, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> a,
                    ffi::Buffer<ffi::F32> b, ffi::Buffer<ffi::S32> layer, ffi::Result<ffi::Buffer<ffi::F32>> y,
                    float scaling) {
  const std::string who = "phi3_low_rank: ";
  const Shape from = x.dimensions(), to = y->dimensions(), narrow = a.dimensions(), wide = b.dimensions();
  if (from.size() == 0 || to.size() != from.size() || !std::equal(from.begin(), from.end() - 1, to.begin()))
    return invalid(who + "x has shape " + text(from) + " and y " + text(to) +
                   ", they may differ in the last size only");
  if (base.dimensions().size() != to.size() || !std::equal(to.begin(), to.end(), base.dimensions().begin()))
    return invalid(who + "the base has shape " + text(base.dimensions()) + " and y " + text(to));
  const int64_t inputs = from.back(), outputs = to.back();
  if (narrow.size() != 3 || wide.size() != 3 || narrow[0] != wide[0] || narrow[1] != wide[2] || narrow[1] < 1 ||
      narrow[2] != inputs || inputs < 1 || wide[1] != outputs || outputs < 1)
    return invalid(who + "a has shape " + text(narrow) + " and b " + text(wide) + ", expected [layers, rank, " +
                   std::to_string(inputs) + "] and [layers, " + std::to_string(outputs) + ", rank]");
  int64_t number = 0;
  if (ffi::Error error = check_layer(who, layer, narrow[0], "the adapter has", &number); error.failure()) return error;
  const int64_t rank = narrow[1], rows = static_cast<int64_t>(x.element_count()) / inputs;
  static thread_local Scratch scratch;
  float* const seen = scratch.get<float>(rows * rank);
  if (!seen) return ffi::Error(ffi::ErrorCode::kResourceExhausted, who + "no memory for a row");
  const float* const first = a.typed_data() + number * rank * inputs;
  const float* const second = b.typed_data() + number * outputs * rank;
  in_parts(pool, rank, inputs * 4, [&](int64_t r, int64_t last) {
    for (; r < last; ++r)
      for (int64_t row = 0; row < rows; ++row)
        seen[row * rank + r] = scaling * dot(first + r * inputs, x.typed_data() + row * inputs, inputs);
  });
  in_parts(pool, outputs, rank * 4, [&](int64_t o, int64_t last) {
    for (; o < last; ++o)
      for (int64_t row = 0; row < rows; ++row)
        y->typed_data()[row * outputs + o] =
            base.typed_data()[row * outputs + o] + dot(second + o * rank, seen + row * rank, rank);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_low_rank, phi3::low_rank,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("scaling"));
#pragma GCC visibility pop
