// The operands of the handlers that read or write the key-value cache. Axis letters as in attention.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "attention/attention.h"
#include "ffi/check.h"
#include "xla/ffi/api/ffi.h"

namespace phi3 {

using Floats = xla::ffi::Buffer<xla::ffi::F32>;
using Ints = xla::ffi::Buffer<xla::ffi::S32>;

constexpr int64_t kSerialWork = 1 << 16;  // products that one thread does before another would have woken up

inline bool same(Shape a, std::initializer_list<int64_t> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

inline xla::ffi::Error check_shape(const std::string& who, const char* name, Shape shape,
                                   std::initializer_list<int64_t> expected, const char* because) {
  if (same(shape, expected)) return xla::ffi::Error::Success();
  return invalid(who + name + " has shape " + text(shape) + ", expected " +
                 text(Shape(expected.begin(), expected.size())) + " " + because);
}

// One layer of the cache.
struct Cache {
  CacheType type;
  int64_t B, K, S, H, layer;

  int64_t head(int64_t b, int64_t k) const { return (layer * B + b) * K + k; }  // counted over all layers
  int64_t head_bytes() const { return S * H * bytes(type); }
};

inline xla::ffi::Error check_cache(const std::string& who, const xla::ffi::AnyBuffer& k, const xla::ffi::AnyBuffer& v,
                                   const Floats& k_scale, const Floats& v_scale, const Ints& layer, Cache* cache) {
  const Shape shape = k.dimensions();
  if (k.element_type() == xla::ffi::F32)
    cache->type = CacheType::kFloat32;
  else if (k.element_type() == xla::ffi::BF16)
    cache->type = CacheType::kBfloat16;
  else if (k.element_type() == xla::ffi::S8)
    cache->type = CacheType::kInt8;
  else
    return invalid(who + "the cache's type is none of float32, bfloat16 and int8");
  if (v.element_type() != k.element_type()) return invalid(who + "k and v have different types");
  if (shape.size() != 5 || !std::equal(shape.begin(), shape.end(), v.dimensions().begin(), v.dimensions().end()))
    return invalid(who + "k has shape " + text(shape) + " and v " + text(v.dimensions()) +
                   ", expected [L, B, K, S, H] twice");
  const int64_t L = shape[0];
  cache->B = shape[1], cache->K = shape[2], cache->S = shape[3], cache->H = shape[4];
  if (cache->S > INT32_MAX)
    return invalid(who + "the cache has " + std::to_string(cache->S) + " slots, more than 2^31 - 1");
  for (const auto& [name, scales] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    if (cache->type == CacheType::kInt8) {
      xla::ffi::Error error =
          check_shape(who, name, scales->dimensions(), {L, cache->B, cache->K, cache->S}, "for an int8 cache");
      if (error.failure()) return error;
    } else if (scales->element_count() != 0) {
      return invalid(who + name + " has shape " + text(scales->dimensions()) + ", but only an int8 cache has scales");
    }
  }
  return check_layer(who, layer, L, "the cache has", &cache->layer);
}

}  // namespace phi3
