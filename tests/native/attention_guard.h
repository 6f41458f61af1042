// Buffers that end right at, or begin right behind, a page that must not be touched.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

enum class Guard { kBehind, kBefore };

template <class T>
class Guarded {
 public:
  Guarded(int64_t count, Guard guard) : count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE), size = count * static_cast<int64_t>(sizeof(T));
    const int64_t inside = (size + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    memory_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || (inside && mprotect(memory_ + page, inside, PROT_READ | PROT_WRITE))) {
      std::perror("guarded buffer");
      std::exit(2);
    }
    data_ = reinterpret_cast<T*>(memory_ + page + (guard == Guard::kBehind ? inside - size : 0));
  }
  Guarded(const std::vector<T>& values, Guard guard) : Guarded(static_cast<int64_t>(values.size()), guard) {
    if (count_) std::memcpy(static_cast<void*>(data_), values.data(), count_ * sizeof(T));
  }
  Guarded(Guarded&& other) : memory_(other.memory_), mapped_(other.mapped_), count_(other.count_), data_(other.data_) {
    other.memory_ = nullptr;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (memory_) munmap(memory_, mapped_);
  }

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  char* memory_;
  int64_t mapped_, count_;
  T* data_;
};
