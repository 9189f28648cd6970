// Scratch of the core.
#pragma once

#include <cstdint>
#include <memory>

namespace vesicle {

template <typename T>
class Buffer {  // aligned, grows, keeps no contents
 public:
  T* get(int64_t n) {
    if (n > size_) {
      storage_.reset(new char[n * sizeof(T) + 64]);
      size_ = n;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.get());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> storage_;
  int64_t size_ = 0;
};

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace vesicle
