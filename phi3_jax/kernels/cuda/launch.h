// What a handler needs to start a kernel: in its file, a function that takes a `Stream` first, and
//
//   PHI3_HANDLER(name, function, phi3::bind().Arg<...>().Ret<...>())
//
// With PHI3_EMULATED, kernels run on the CPU, in programs for it (tests/kernels/cuda/emulator.h).
#pragma once
#include "xla/ffi/api/ffi.h"

namespace phi3 {

#if defined(PHI3_EMULATED)
using Stream = xla::ffi::ThreadPool;  // of no use, but a program for the CPU has no stream
using StreamContext = xla::ffi::ThreadPool;
#else
using Stream = void*;
using StreamContext = xla::ffi::PlatformStream<void*>;
#endif

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Starts a kernel, which a .cu file defines with PHI3_KERNEL, with blocks of so many threads and bytes of dynamic shared
// memory; `arguments` points to each argument. Nothing is started if the grid has no block.
xla::ffi::Error launch(Stream stream, const char* kernel, Grid grid, unsigned threads, unsigned shared_bytes,
                       void** arguments);

template <class... A>
xla::ffi::Error launch(Stream stream, const char* kernel, Grid grid, unsigned threads, unsigned shared_bytes,
                       A... arguments) {
  void* pointers[] = {&arguments...};
  return launch(stream, kernel, grid, threads, shared_bytes, static_cast<void**>(pointers));
}

inline auto bind() { return xla::ffi::Ffi::Bind().Ctx<StreamContext>(); }

}  // namespace phi3

// A command buffer (a CUDA graph) may record what the handler starts.
#define PHI3_HANDLER(name, function, binding)                                                                \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*);                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding, {xla::ffi::Traits::kCmdBufferCompatible})
