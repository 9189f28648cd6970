// A pool of threads that spin for a moment and then sleep, so that a busy machine loses nothing to waiting.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace vesicle {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until a counter leaves a value: first spinning, then asleep.
class Signal {
 public:
  int64_t value() const { return count_.load(std::memory_order_acquire); }

  void wait(int64_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      if (count_.load(std::memory_order_acquire) != seen) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    asleep_.wait(lock, [&] { return count_.load() != seen; });
    sleepers_.fetch_sub(1);
  }

  void raise() {
    count_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      asleep_.notify_all();
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds
  std::atomic<int64_t> count_{0};
  std::atomic<int32_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable asleep_;
};

class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads) : threads_(threads) {
    for (int64_t t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
  }

  ~ThreadPool() {
    job_ = nullptr;
    start_.raise();
    for (auto& worker : workers_) worker.join();
  }

  int64_t threads() const { return threads_; }

  // Calls job->run(thread) on all threads, the caller's among them, and returns when all have finished.
  template <typename T>
  void run(T* job) {
    job_ = [](void* argument, int64_t thread) { static_cast<T*>(argument)->run(thread); };
    argument_ = job;
    start_.raise();
    job->run(0);
    barrier();
  }

  // To be called by every thread of a job the same number of times.
  void barrier() {
    if (threads_ == 1) return;
    const int64_t seen = arrived_.value();
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      arrived_.raise();
    } else {
      arrived_.wait(seen);
    }
  }

 private:
  typedef void (*Job)(void* argument, int64_t thread);

  void work(int64_t thread) {
    for (int64_t seen = 0;; ++seen) {
      start_.wait(seen);
      if (!job_) return;
      job_(argument_, thread);
      barrier();
    }
  }

  const int64_t threads_;
  std::vector<std::thread> workers_;
  Job job_ = nullptr;
  void* argument_ = nullptr;
  Signal start_, arrived_;
  std::atomic<int64_t> waiting_{0};
};

}  // namespace vesicle
