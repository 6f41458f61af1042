// Starts kernels through the driver, which is looked up when it is first needed: the library is compiled and loaded, and
// programs are compiled with its handlers, where there is no card.
#include "launch.h"

#include <stdexcept>
#include <string>

#if defined(PHI3_EMULATED)

#include "intrinsics.h"

namespace phi3 {

xla::ffi::Error launch(Stream, const char* kernel, Grid grid, unsigned threads, unsigned shared_bytes,
                       void** arguments) {
  if (!grid.x || !grid.y || !grid.z) return xla::ffi::Error::Success();
  try {
    emulated::launch(kernel, {grid.x, grid.y, grid.z}, {threads, 1, 1}, shared_bytes, arguments);
  } catch (const std::runtime_error& error) {
    return xla::ffi::Error::Internal(error.what());
  }
  return xla::ffi::Error::Success();
}

}  // namespace phi3

#else

#include <dlfcn.h>

#include <iterator>
#include <map>
#include <mutex>
#include <vector>

namespace phi3 {
namespace {

using xla::ffi::Error;
using Handle = void*;  // of a context, module, function or stream
using Code = int;      // 0 is success
// Numbers of cuda.h.
constexpr int kMajor = 75, kMinor = 76;          // attributes of a device
constexpr int kDynamicShared = 8;                // an attribute of a function
constexpr int kRelaxed = 2;                      // a mode of capturing
constexpr Code kNotFound = 500;
constexpr unsigned kSharedWithoutAsking = 48 << 10;  // bytes

// The driver's functions, by their names in libcuda.
struct Driver {
  Code (*cuCtxGetCurrent)(Handle*) = nullptr;
  Code (*cuCtxGetDevice)(int*) = nullptr;
  Code (*cuDeviceGetAttribute)(int*, int, int) = nullptr;
  Code (*cuThreadExchangeStreamCaptureMode)(int*) = nullptr;
  Code (*cuModuleLoadData)(Handle*, const void*) = nullptr;
  Code (*cuModuleGetFunction)(Handle*, Handle, const char*) = nullptr;
  Code (*cuFuncSetAttribute)(Handle, int, int) = nullptr;
  Code (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                         void**) = nullptr;
  Code (*cuGetErrorString)(Code, const char**) = nullptr;
  std::string missing;  // what could not be found

  Driver() {
    Handle library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
      missing = "the driver's libcuda.so.1";
      return;
    }
#define PHI3_FIND(name) \
  if (!(name = reinterpret_cast<decltype(name)>(dlsym(library, #name)))) missing = #name " in libcuda.so.1"
    PHI3_FIND(cuCtxGetCurrent);
    PHI3_FIND(cuCtxGetDevice);
    PHI3_FIND(cuDeviceGetAttribute);
    PHI3_FIND(cuThreadExchangeStreamCaptureMode);
    PHI3_FIND(cuModuleLoadData);
    PHI3_FIND(cuModuleGetFunction);
    PHI3_FIND(cuFuncSetAttribute);
    PHI3_FIND(cuLaunchKernel);
    PHI3_FIND(cuGetErrorString);
#undef PHI3_FIND
  }

  std::string explain(const char* what, Code code) const {
    const char* text = nullptr;
    if (cuGetErrorString(code, &text) || !text) text = "an unknown error";
    return std::string(what) + " failed: " + text + " (" + std::to_string(code) + ")";
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

struct Function {
  Handle handle = nullptr;
  unsigned shared_bytes = kSharedWithoutAsking;  // that a launch may ask for by now
};
struct Context {  // a card's
  std::vector<Handle> modules;
  bool is_loaded = false;  // all of them
  std::map<std::string, Function> functions;
};

std::mutex mutex;  // of what follows
std::multimap<int, std::string> images;  // by compute capability: 90 for 9.0
std::map<Handle, Context> contexts;

// While a stream records a CUDA graph, this thread may not load anything, unless it says that it knows what it does.
struct Relaxed {
  int mode = kRelaxed;
  Relaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { driver().cuThreadExchangeStreamCaptureMode(&mode); }
};

std::string load(Context* context) {
  int device = 0, major = 0, minor = 0;
  if (Code code = driver().cuCtxGetDevice(&device)) return driver().explain("cuCtxGetDevice", code);
  for (auto [number, attribute] : {std::pair{&major, kMajor}, std::pair{&minor, kMinor}})
    if (Code code = driver().cuDeviceGetAttribute(number, attribute, device))
      return driver().explain("cuDeviceGetAttribute", code);
  const auto [first, last] = images.equal_range(10 * major + minor);
  if (first == last)
    return "they were not compiled for a card of compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + ", which was not there when the program was traced";
  // Where one fails, as memory may be short, the next launch goes on with it.
  for (auto image = std::next(first, context->modules.size()); image != last; ++image) {
    Handle module = nullptr;
    if (Code code = driver().cuModuleLoadData(&module, image->second.data()))
      return driver().explain("cuModuleLoadData", code);
    context->modules.push_back(module);
  }
  context->is_loaded = true;
  return "";
}

// The kernel in the current context, ready for a launch with so much shared memory; or else what failed.
std::string find(const char* kernel, unsigned shared_bytes, Handle* handle) {
  if (!driver().missing.empty()) return "there is no " + driver().missing;
  Handle current = nullptr;
  if (Code code = driver().cuCtxGetCurrent(&current)) return driver().explain("cuCtxGetCurrent", code);
  const std::lock_guard<std::mutex> lock(mutex);
  Context& context = contexts[current];
  Function& function = context.functions[kernel];
  if (!function.handle || function.shared_bytes < shared_bytes) {
    const Relaxed relaxed;
    if (!context.is_loaded)
      if (std::string problem = load(&context); !problem.empty()) return problem;
    for (size_t i = 0; i < context.modules.size() && !function.handle; ++i)
      if (Code code = driver().cuModuleGetFunction(&function.handle, context.modules[i], kernel)) {
        function.handle = nullptr;
        if (code != kNotFound) return driver().explain("cuModuleGetFunction", code);  // it may load the kernel now
      }
    if (!function.handle) return "no module has this kernel";
    if (function.shared_bytes < shared_bytes) {
      if (Code code = driver().cuFuncSetAttribute(function.handle, kDynamicShared, static_cast<int>(shared_bytes)))
        return driver().explain("cuFuncSetAttribute", code) + "; it asks for " + std::to_string(shared_bytes) +
               " bytes of shared memory";
      function.shared_bytes = shared_bytes;
    }
  }
  *handle = function.handle;
  return "";
}

}  // namespace

Error launch(Stream stream, const char* kernel, Grid grid, unsigned threads, unsigned shared_bytes, void** arguments) {
  if (!grid.x || !grid.y || !grid.z) return Error::Success();
  Handle function = nullptr;
  const std::string who = std::string("the CUDA kernel ") + kernel + ": ";
  if (std::string problem = find(kernel, shared_bytes, &function); !problem.empty())
    return Error::Internal(who + problem);
  if (Code code = driver().cuLaunchKernel(function, grid.x, grid.y, grid.z, threads, 1, 1, shared_bytes, stream,
                                          arguments, nullptr))
    return Error::Internal(who + driver().explain("cuLaunchKernel", code));
  return Error::Success();
}

}  // namespace phi3

// Adds kernels (a cubin) for cards of this compute capability; to be called before one is started there.
extern "C" __attribute__((visibility("default"))) void phi3_cuda_add(int capability, const char* image, size_t bytes) {
  const std::lock_guard<std::mutex> lock(phi3::mutex);
  phi3::images.emplace(capability, std::string(image, bytes));
}

#endif
