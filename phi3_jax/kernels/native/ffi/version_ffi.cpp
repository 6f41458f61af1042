// The version of XLA's interface that this library was compiled for, asked before a handler is registered.
#include "xla/ffi/api/c_api.h"

#define PHI3_EXPORT extern "C" __attribute__((visibility("default")))

PHI3_EXPORT int phi3_ffi_api_major() { return XLA_FFI_API_MAJOR; }
PHI3_EXPORT int phi3_ffi_api_minor() { return XLA_FFI_API_MINOR; }
