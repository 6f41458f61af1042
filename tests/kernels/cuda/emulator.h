// Runs CUDA kernels on a CPU: intrinsics.h includes this in place of the instructions, if PHI3_EMULATED is defined.
//
// Blocks run one after another, a block's threads as fibers that change at barriers and at what a warp does together.
// What is an error on a card, or would hang there, throws: threads that wait in different places, or for one that has
// ended; addresses that are not aligned. Shared memory holds NaNs (all bits set) until it is written; asynchronous
// copies arrive when they are waited for, not before; every other block runs its threads in descending order, and copies
// at once, so that a missing barrier shows. Out-of-bounds accesses are for the sanitizer to find.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define PHI3_KERNEL(threads, name, ...)                                            \
  extern "C" void name(__VA_ARGS__);                                               \
  static const phi3::emulated::Registered registered_##name(#name, threads, name); \
  extern "C" void name(__VA_ARGS__)
#define PHI3_SHARED(type, name, ...)                                \
  static const char name##_key = 0;                                 \
  type(&name) __VA_ARGS__ = *reinterpret_cast<type(*) __VA_ARGS__>( \
      phi3::emulated::static_shared(&name##_key, sizeof(type __VA_ARGS__)))
#define PHI3_DYNAMIC_SHARED(name) unsigned char* const name = phi3::emulated::block.dynamic.data()
#define __syncthreads() phi3::emulated::barrier(__LINE__)

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace phi3 {
namespace emulated {

constexpr size_t kStack = 1 << 18;
enum class At { kRunning, kBlock, kWarp, kEnd };

struct alignas(64) Slot {
  unsigned char bytes[64];
};
struct Fiber {
  void* jump[5];
  ucontext_t first;
  std::vector<char> stack = std::vector<char>(kStack);
  bool begun = false;
  At at = At::kRunning;
  int line = 0;
  size_t asked = 0;  // how often block_any
  struct Copy {
    void* to;
    const void* from;  // nullptr for zeros
    void run() const {
      if (from)
        std::memcpy(to, from, 16);
      else
        std::memset(to, 0, 16);
    }
  };
  std::deque<std::vector<Copy>> copies = std::deque<std::vector<Copy>>(1);  // committed groups, then the open one
};
struct Warp {
  Slot slots[2][32];  // what lanes give each other, in turns
  unsigned turn[32];
};
struct Block {
  std::vector<unsigned char> dynamic;
  std::map<const void*, std::vector<unsigned char>> statics;
  std::vector<Warp> warps;
  std::deque<Fiber> fibers;  // their stacks are kept from block to block
  bool eager = false;        // copies at once
  std::vector<bool> any;     // by turn, what block_any's threads have said together
  unsigned current = 0;
  void* scheduler[5];
  ucontext_t scheduler_first;
  std::string failure;
  std::function<void()> kernel;
};
inline Block block;

__attribute__((noinline, noreturn)) inline void jump_to(void** where) { __builtin_longjmp(where, 1); }

// Back to `run_block`; returns when this thread's turn comes again.
__attribute__((noinline)) inline void pause(At at, int line) {
  Fiber& fiber = block.fibers[block.current];
  fiber.at = at, fiber.line = line;
  if (__builtin_setjmp(fiber.jump)) return;
  jump_to(block.scheduler);
}
[[noreturn]] inline void fail(const std::string& text) {
  block.failure = "thread " + std::to_string(block.current) + ": " + text;
  for (;;) pause(At::kEnd, 0);
}
inline void body() {
  block.kernel();
  pause(At::kEnd, 0);
  std::abort();
}
__attribute__((noinline)) inline void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  fiber.at = At::kRunning;
  if (__builtin_setjmp(block.scheduler)) return;
  if (fiber.begun) jump_to(fiber.jump);
  fiber.begun = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.data();
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, body, 0);
  setcontext(&fiber.first);
}

// Lets threads [begin, end) go on that wait at `at`, if all of them do.
inline bool release(unsigned begin, unsigned end, At at) {
  const int line = block.fibers[begin].line;
  for (unsigned i = begin; i < end; ++i)
    if (block.fibers[i].at != at || block.fibers[i].line != line) return false;
  for (unsigned i = begin; i < end; ++i) block.fibers[i].at = At::kRunning;
  return true;
}
inline std::string where(unsigned thread) {
  const Fiber& fiber = block.fibers[thread];
  const std::string line = " at line " + std::to_string(fiber.line);
  return "thread " + std::to_string(thread) + (fiber.at == At::kEnd    ? " has ended"
                                               : fiber.at == At::kBlock ? " waits for its block" + line
                                                                        : " waits for its warp" + line);
}
inline void run_block(unsigned threads, bool descending) {
  while (block.fibers.size() < threads) block.fibers.emplace_back();
  for (Fiber& fiber : block.fibers) fiber.begun = false, fiber.at = At::kRunning, fiber.asked = 0, fiber.copies.assign(1, {});
  block.any.clear(), block.eager = descending;
  block.warps.assign(threads / 32, {});
  std::fill(block.dynamic.begin(), block.dynamic.end(), 0xff);
  for (auto& [key, bytes] : block.statics) std::fill(bytes.begin(), bytes.end(), 0xff);
  // A warp goes on as far as it can before the next one begins: what it must not read yet is not there.
  const auto run_warp = [&](unsigned first) {
    bool moved = false;
    do
      for (unsigned i = 0; i < 32; ++i) {
        const unsigned thread = first + (descending ? 31 - i : i);
        if (block.fibers[thread].at != At::kRunning) continue;
        resume(thread);
        moved = true;
        if (!block.failure.empty()) throw std::runtime_error(std::exchange(block.failure, ""));
      }
    while (release(first, first + 32, At::kWarp));
    return moved;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned i = 0; i < threads; i += 32) moved |= run_warp(descending ? threads - 32 - i : i);
    moved |= release(0, threads, At::kBlock);
  }
  for (unsigned i = 1; i < threads; ++i)
    if (block.fibers[i].at != block.fibers[0].at || block.fibers[i].line != block.fibers[0].line)
      throw std::runtime_error("divergent: " + where(0) + ", " + where(i));
  if (block.fibers[0].at != At::kEnd) throw std::runtime_error("divergent: " + where(0));
}

struct Kernel {
  unsigned threads;
  std::function<void(void**)> call;
};
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> known;
  return known;
}
struct Registered {
  template <class... A>
  Registered(const char* name, unsigned threads, void (*kernel)(A...)) {
    kernels()[name] = {threads, [kernel](void** arguments) { unpack(kernel, arguments, std::index_sequence_for<A...>()); }};
  }
  template <class... A, size_t... i>
  static void unpack(void (*kernel)(A...), void** arguments, std::index_sequence<i...>) {
    kernel(*static_cast<A*>(arguments[i])...);
  }
};

// Runs a kernel with arguments as cuLaunchKernel takes them. Throws std::runtime_error.
inline void launch(const std::string& name, dim3 grid, dim3 threads, size_t shared_bytes, void** arguments) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::runtime_error("there is no kernel " + name);
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count % 32 || count > found->second.threads)
    throw std::runtime_error(name + ": blocks of " + std::to_string(count) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(name + ": a grid that a card refuses");
  if (shared_bytes > 99 << 10) throw std::runtime_error(name + ": more shared memory than every card has");
  gridDim = grid, blockDim = threads;
  block.dynamic = std::vector<unsigned char>(shared_bytes);
  block.statics.clear();
  block.kernel = [&] { found->second.call(arguments); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) try {
          run_block(count, (blockIdx.x + blockIdx.y + blockIdx.z) % 2);
        } catch (const std::runtime_error& error) {
          throw std::runtime_error(name + ": " + error.what());
        }
}

inline unsigned char* static_shared(const void* key, size_t size) {
  auto& bytes = block.statics[key];
  if (bytes.empty()) bytes.assign(size, 0xff);
  return bytes.data();
}
inline void barrier(int line) { pause(At::kBlock, line); }
inline unsigned lane() { return block.current % 32; }

// What all lanes of this warp gave, by lane.
template <class T>
const Slot* exchange(const T& mine, int line) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Warp& warp = block.warps[block.current / 32];
  Slot* slots = warp.slots[warp.turn[lane()]++ % 2];
  std::memcpy(slots[lane()].bytes, &mine, sizeof mine);
  pause(At::kWarp, line);
  return slots;
}
template <class T>
T from(const Slot& slot) {
  T value;
  std::memcpy(&value, slot.bytes, sizeof value);
  return value;
}
inline void aligned(const void* p, size_t bytes = 16) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("an address is not a multiple of " + std::to_string(bytes));
}

}  // namespace emulated
}  // namespace phi3
#include "emulated_instructions.h"
