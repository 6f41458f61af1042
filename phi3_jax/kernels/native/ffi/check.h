// What the handlers share to say which operand does not fit.
#pragma once
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace phi3 {

using Shape = xla::ffi::Span<const int64_t>;

inline xla::ffi::Error invalid(const std::string& sentence) { return xla::ffi::Error::InvalidArgument(sentence); }

inline std::string text(Shape shape) {
  std::string all = "[";
  for (size_t i = 0; i < shape.size(); ++i) all += (i ? ", " : "") + std::to_string(shape[i]);
  return all + "]";
}

// Reads the operand `layer`, one of `count`; owner_has: "the weights have", for instance.
inline xla::ffi::Error check_layer(const std::string& who, const xla::ffi::Buffer<xla::ffi::S32>& layer, int64_t count,
                                   const char* owner_has, int64_t* number) {
  if (layer.element_count() != 1)
    return invalid(who + "layer has shape " + text(layer.dimensions()) + ", expected one number");
  *number = layer.typed_data()[0];
  if (*number < 0 || *number >= count)
    return invalid(who + "layer is " + std::to_string(*number) + ", but " + owner_has + " " + std::to_string(count) +
                   " layers");
  return xla::ffi::Error::Success();
}

}  // namespace phi3
