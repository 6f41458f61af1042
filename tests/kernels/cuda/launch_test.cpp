// What launch.cpp asks of the driver, which is fake_driver.cpp here.
#include <cstdio>
#include <cstring>
#include <string>

#include "launch.h"

extern "C" void phi3_cuda_add(int, const char*, size_t);
extern "C" void* fake_context;
extern "C" int fake_minor, fake_failing, fake_short;
extern "C" char fake_calls[];

namespace {

int failures = 0;
void expect(const std::string& found, const std::string& expected) {
  if (found == expected) return;
  std::printf("found:\n%s\nexpected:\n%s\n", found.c_str(), expected.c_str());
  ++failures;
}
std::string calls() {
  std::string all = fake_calls;
  fake_calls[0] = 0;
  return all;
}
std::string launched(const char* kernel, unsigned blocks, unsigned bytes) {
  const auto error = phi3::launch(reinterpret_cast<void*>(5), kernel, {blocks, 2, 3}, 64, bytes, 42, 1.5);
  return error.success() ? "" : error.message();
}

std::string launched_and_calls(const char* kernel, unsigned blocks, unsigned bytes) {
  const std::string error = launched(kernel, blocks, bytes);
  return error + calls();
}

}  // namespace

int main() {
  const std::string who = "the CUDA kernel kernel: ";
  phi3_cuda_add(90, "first", 6);
  phi3_cuda_add(80, "other", 6);
  phi3_cuda_add(90, "second", 7);
  expect(launched_and_calls("kernel", 0, 0), "");  // no block: nothing is asked

  const std::string load = "mode 2\nload first\nload second\n";
  const std::string launch = "launch second 4 2 3, 64 threads, ", arguments = " bytes, stream 5, 42 1.5\n";
  expect(launched_and_calls("kernel", 4, 100), load + "mode 1\n" + launch + "100" + arguments);
  expect(launched_and_calls("kernel", 4, 49152), launch + "49152" + arguments);  // nothing is loaded twice
  expect(launched_and_calls("kernel", 4, 60000), "mode 2\nattribute 8 60000\nmode 1\n" + launch + "60000" + arguments);
  expect(launched_and_calls("kernel", 4, 50000), launch + "50000" + arguments);  // it may have 60000 by now
  expect(launched("kernel", 4, 300000),
         who + "cuFuncSetAttribute failed: no (1); it asks for 300000 bytes of shared memory");
  calls();
  fake_context = reinterpret_cast<void*>(2);  // another card
  expect(launched_and_calls("kernel", 4, 60000),
         load + "attribute 8 60000\nmode 1\n" + launch + "60000" + arguments);
  expect(launched("no_kernel", 4, 0), "the CUDA kernel no_kernel: no module has this kernel");
  fake_failing = 719;
  expect(launched("kernel", 4, 0), who + "cuLaunchKernel failed: launch failure (719)");
  fake_failing = 0;
  fake_context = reinterpret_cast<void*>(3), fake_minor = 1;
  expect(launched("kernel", 4, 0), who + "they were not compiled for a card of compute capability 9.1, which was not " +
                                       "there when the program was traced");
  fake_context = reinterpret_cast<void*>(4), fake_minor = 0, fake_short = 1;
  calls();
  expect(launched("kernel", 4, 0), who + "cuModuleLoadData failed: out of memory (2)");
  fake_short = 2;  // what is loaded stays, and the rest is tried again
  expect(launched("kernel", 4, 0), who + "cuModuleGetFunction failed: out of memory (2)");
  fake_short = 0;
  expect(launched_and_calls("kernel", 4, 0), load + "mode 1\nmode 2\nload second\nmode 1\nmode 2\nmode 1\n" + launch +
                                                 "0" + arguments);
  if (!failures) std::printf("ok\n");
  return failures != 0;
}
