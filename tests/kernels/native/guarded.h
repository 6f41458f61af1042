// Memory between two pages that may not be touched: a read or write outside of it stops the test.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

enum class Guard { kBehind, kBefore };

// `count` elements, right before the page behind them or right behind the page before them.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, Guard guard = Guard::kBehind) : count_(count) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = count * static_cast<int64_t>(sizeof(T));
    const int64_t inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    whole_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (whole_ == MAP_FAILED || (inside && mprotect(whole_ + page, inside, PROT_READ | PROT_WRITE))) {
      std::perror("guarded memory");
      std::exit(2);
    }
    data_ = reinterpret_cast<T*>(whole_ + page + (guard == Guard::kBehind ? inside - bytes : 0));
  }
  Guarded(const std::vector<T>& values, Guard guard) : Guarded(static_cast<int64_t>(values.size()), guard) {
    if (count_) std::memcpy(static_cast<void*>(data_), values.data(), count_ * sizeof(T));
  }
  Guarded(Guarded&& other) noexcept { *this = std::move(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(whole_, other.whole_);
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Guarded() {
    if (whole_) munmap(whole_, size_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + count_; }

 private:
  char* whole_ = nullptr;
  int64_t size_ = 0, count_ = 0;
  T* data_ = nullptr;
};
