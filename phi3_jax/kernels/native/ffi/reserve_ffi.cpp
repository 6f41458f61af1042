// The handler that XLA calls for a cache that holds nothing yet: it leaves the memory as it came. The system makes a page
// of a large array when it is first written to, so slots that are never used take neither memory nor time. Not so with
// huge pages: a head's slots are hardly longer than one, and its first slot would make it.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace phi3 {
namespace {

xla::ffi::Error reserve(xla::ffi::Result<xla::ffi::AnyBuffer> cache) {
#if defined(__linux__)
  const uintptr_t page = sysconf(_SC_PAGESIZE), begin = reinterpret_cast<uintptr_t>(cache->untyped_data());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + cache->size_bytes()) / page * page;
  // Advice: a system without huge pages refuses it.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_NOHUGEPAGE);
#endif
  return xla::ffi::Error::Success();
}

}  // namespace
}  // namespace phi3

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(phi3_reserve, phi3::reserve, xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());
#pragma GCC visibility pop
