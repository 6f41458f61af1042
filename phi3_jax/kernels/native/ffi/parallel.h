// Work in chunks on XLA's own threads, and memory that a thread keeps from call to call.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace phi3 {

// Calls f(chunk) for every chunk in [0, chunks), in any order, on several threads; returns when all are done.
template <class F>
void parallel(xla::ffi::ThreadPool& pool, int64_t chunks, const F& f) {
  const int64_t threads = pool.num_threads();
  if (threads <= 1 || chunks <= 1) {
    for (int64_t i = 0; i < chunks; ++i) f(i);
    return;
  }
  // Shared, because a task may only begin after the others have done all the work and this function has returned.
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, chunks, &f] {
    int64_t i;
    while ((i = state->next.fetch_add(1)) < chunks) {
      f(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads && t < chunks; ++t) {
    auto task = work;
    pool.Schedule(std::move(task));
  }
  work();
  while (state->done.load(std::memory_order_acquire) < chunks) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }
}

// A buffer that only grows, aligned to a page; keep one `static thread_local` for each use.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for `count` elements, or nullptr if there is no memory for them.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > size_ || !data_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096 + 4096;
      data_ = std::aligned_alloc(4096, size_);
      if (!data_) size_ = 0;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace phi3
