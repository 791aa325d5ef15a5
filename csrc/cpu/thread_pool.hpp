// A fixed team of threads that runs one function together (SPMD): f(worker) on every thread, with barriers inside.
//
// Waiting spins for some microseconds, then sleeps in the kernel, so that a decode step pays no system call and an
// idle server burns nothing. The calling thread is worker 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#endif

namespace martlet {

// A 32-bit word that threads can wait on.
class Event {
 public:
  uint32_t value() const { return word_.load(std::memory_order_acquire); }

  // Returns once the word differs from `old`.
  void wait(uint32_t old, int spins) {
    for (int i = 0; i < spins; ++i) {
      if (value() != old) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    sleepers_.fetch_add(1);
    while (word_.load() == old) sleep(old);
    sleepers_.fetch_sub(1);
  }

  void advance() {
    word_.fetch_add(1);
    if (sleepers_.load()) wake();
  }

 private:
#if defined(__linux__)
  void sleep(uint32_t old) { syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(uint32_t old) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return word_.load() != old; });
  }
  void wake() {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
  std::atomic<uint32_t> word_{0};
  std::atomic<int> sleepers_{0};
};

class Team;

// One thread's hand on the team while a job runs.
struct Worker {
  Team& team;
  int rank;
  uint32_t loops = 0;  // parallel loops entered in this job; the same on every thread at the same place

  void barrier();
  // Calls f(begin, end) for pieces of 0 ... n - 1, dealt out as threads get free; ends with a barrier.
  template <class Body>
  void each(int n, int grain, Body&& f);
};

class Team {
 public:
  // spins: how long a waiting thread polls before it sleeps; 0 where there are more threads than cores.
  Team(int size, int spins) : size_(size < 1 ? 1 : size), spins_(spins) {
    for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { serve(rank); });
  }

  ~Team() {
    job_ = nullptr;
    start_.advance();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  void run(const std::function<void(Worker&)>& job) {
    std::lock_guard<std::mutex> lock(running_);
    for (auto& counter : next_) counter.store(0, std::memory_order_relaxed);
    job_ = &job;
    start_.advance();
    Worker self{*this, 0};
    job(self);
    barrier();
  }

  void barrier() {
    const uint32_t generation = open_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      open_.advance();
    } else {
      open_.wait(generation, spins_);
    }
  }

 private:
  friend struct Worker;

  void serve(int rank) {
    for (uint32_t seen = 0;; ++seen) {
      start_.wait(seen, spins_);
      if (!job_) return;
      Worker self{*this, rank};
      (*job_)(self);
      barrier();
    }
  }

  const int size_, spins_;
  Event start_, open_;
  std::atomic<int> arrived_{0};
  // Loop i takes its pieces from counter i % 4. Threads are at most one loop apart, so entering loop i frees i + 2.
  std::atomic<int> next_[4] = {};
  const std::function<void(Worker&)>* job_ = nullptr;
  std::mutex running_;
  std::vector<std::thread> threads_;
};

inline void Worker::barrier() { team.barrier(); }

template <class Body>
void Worker::each(int n, int grain, Body&& f) {
  std::atomic<int>& next = team.next_[loops % 4];
  team.next_[(loops + 2) % 4].store(0, std::memory_order_relaxed);
  ++loops;
  const int first = team.size() * grain;  // the first piece of each thread is its own: no contention in short loops
  for (int begin = rank * grain; begin < n; begin = first + next.fetch_add(grain, std::memory_order_relaxed))
    f(begin, begin + grain < n ? begin + grain : n);
  barrier();
}

}  // namespace martlet
