// A libcuda.so.1 of tests' own: it writes down what it is asked, has two contexts, and one kernel in its second module.
#include <cstdio>
#include <cstring>
#include <string>

extern "C" {

void* fake_context = reinterpret_cast<void*>(1);
int fake_minor = 0, fake_failing = 0;  // compute capability 9.minor; a launch fails
int fake_short = 0;  // memory is short: for the second module (1), or for a kernel (2)
char fake_calls[10000];

static void note(const std::string& call) { std::strcat(fake_calls, (call + "\n").c_str()); }

int cuCtxGetCurrent(void** context) { return *context = fake_context, 0; }
int cuCtxGetDevice(int* device) { return *device = 7, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? fake_minor : -1;
  return device == 7 ? 0 : 101;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static int now = 1;
  note("mode " + std::to_string(*mode));
  const int before = now;
  now = *mode, *mode = before;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  note(std::string("load ") + static_cast<const char*>(image));
  if (fake_short == 1 && !std::strcmp(static_cast<const char*>(image), "second")) return 2;
  *module = const_cast<void*>(image);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (std::strcmp(static_cast<const char*>(module), "second") || std::strcmp(name, "kernel")) return 500;
  if (fake_short == 2) return 2;
  *function = module;
  return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  note("attribute " + std::to_string(attribute) + " " + std::to_string(value));
  return value > 200000 ? 1 : 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** arguments, void**) {
  char text[200];
  std::snprintf(text, sizeof text, "launch %s %u %u %u, %u threads, %u bytes, stream %d, %d %.1f",
                static_cast<const char*>(function), x, y, z, threads, shared,
                static_cast<int>(reinterpret_cast<long long>(stream)), *static_cast<int*>(arguments[0]),
                *static_cast<double*>(arguments[1]));
  note(text);
  return fake_failing;
}
int cuGetErrorString(int code, const char** text) { return *text = code == 719 ? "launch failure" : code == 2 ? "out of memory" : "no", 0; }
}
