// A fixed team of threads that run one function together (SPMD): f(worker) on every thread, with parallel loops inside.
//
// A loop waits for its pieces and not for threads: whoever has lost its core between two pieces holds nobody up, and
// skips what the others have finished when it comes back. Only the end of a job waits for everyone.
// Waiting spins for some microseconds, then sleeps in the kernel, so that a decode step pays no system call, an idle
// server burns nothing, and a core is free for the thread that is waited for. The calling thread is worker 0.
//
// It may be late as well, on purpose: `begin` returns while the others work, and the caller joins them when it has done
// what else it had to do. What a late thread finds:
//  - Loops that are over: `each` takes no piece of them and returns; what their bodies wrote is there to read, since
//    whoever counts the last items of a loop publishes all of it with loop_, which every thread reads before it goes on.
//  - The loop that is open, with pieces left or not: it takes what is left, of its own range first.
//  - Memory that loops beyond write, in any state. So between loops it may read what the job leaves unchanged, and what
//    is its own; what it prepares for a loop may turn out wrong only where that loop is over (see `behind`).
//  - Barriers, where the others wait for it: whatever they would overwrite next is still as it was.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
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

  void barrier();  // waits for every thread
  // Calls f(begin, end) for pieces of 0 ... n - 1; returns when all pieces are done. Each thread goes through a range of
  // its own (see Team::first_of) from its beginning, then through what others have left of theirs.
  // What a thread does between loops must be for itself alone: it may be late, and the loop it comes to over.
  template <class Body>
  void each(int n, int grain, Body&& f);
  // Whether the others have finished the next loop already: nothing need be prepared for it.
  bool behind() const;
};

class Team {
 public:
  // spins: how long a waiting thread polls before it sleeps; 0 where there are more threads than cores.
  Team(int size, int spins) : size_(size < 1 ? 1 : size), spins_(spins) {
    for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { serve(rank); });
  }

  // No job may be under way.
  ~Team() {
    job_ = nullptr;
    start_.advance();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  void run(std::function<void(Worker&)> job) {
    begin(std::move(job));
    job_(caller_);
    end();
  }

  // Starts a job on all threads but the calling one, which is to do its part with `caller`, in one piece or several,
  // before it calls `end`. Calls follow each other: one thread's, or ordered by whoever passes the team on.
  void begin(std::function<void(Worker&)> job) {
    loop_.store(0, std::memory_order_relaxed);
    for (int rank = 0; rank < size_; ++rank) ranges_[rank].taken.store(0, std::memory_order_relaxed);
    caller_.loops = 0;
    job_ = std::move(job);
    start_.advance();
  }

  Worker& caller() { return caller_; }

  // Returns when everybody has done the job.
  void end() { barrier(); }

  // The first piece of a thread's range. All ranges are in one piece and alike, so that a thread reads memory in order
  // (two streams of weights come a tenth faster than one that threads take turns at), and the same in every step.
  int first_of(int rank, int pieces) const { return int((int64_t(rank) * pieces + size_ - 1) / size_); }

  // Returns once loop `l` is over.
  void await(uint32_t l) {
    for (;;) {
      const uint32_t seen = opened_.value();
      if (loop() != l) return;
      opened_.wait(seen, spins_);
    }
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
      job_(self);
      barrier();
    }
  }

  // taken: the loop, and in the low half how many pieces of this range are gone in it; of an earlier loop: none.
  struct alignas(64) Range {
    std::atomic<uint64_t> taken{0};
  };
  // The next of `count` pieces of a thread's range in a loop, counted from 0; -1 when there is none, or the loop is over.
  int take(int rank, uint32_t loop, int count) {
    std::atomic<uint64_t>& taken = ranges_[rank].taken;
    for (uint64_t seen = taken.load(std::memory_order_acquire);;) {
      const uint32_t last = uint32_t(seen >> 32);
      const int gone = last == loop ? int(uint32_t(seen)) : 0;
      if (last > loop || gone >= count) return -1;
      if (taken.compare_exchange_weak(seen, uint64_t(loop) << 32 | uint64_t(gone + 1), std::memory_order_acq_rel))
        return gone;
    }
  }
  uint32_t loop() const { return loop_.load(std::memory_order_acquire); }
  // Counts items of loop `l` as done; the last ones open the next loop.
  void count(uint32_t l, int items, int n) {
    if (done_.fetch_add(items, std::memory_order_acq_rel) + items < n) return;
    done_.store(0, std::memory_order_relaxed);
    loop_.store(l + 1, std::memory_order_release);
    opened_.advance();
  }

  const int size_, spins_;
  Event start_, open_, opened_;
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> loop_{0};  // the open one
  alignas(64) std::atomic<int> done_{0};       // items of the open loop that are done
  std::unique_ptr<Range[]> ranges_{new Range[size_t(size_)]};
  std::function<void(Worker&)> job_;
  Worker caller_{*this, 0};
  std::vector<std::thread> threads_;
};

inline void Worker::barrier() { team.barrier(); }

inline bool Worker::behind() const { return team.loop() != loops; }

template <class Body>
void Worker::each(int n, int grain, Body&& f) {
  const uint32_t loop = loops++;
  const int size = team.size(), pieces = n > 0 ? (n + grain - 1) / grain : 0;
  if (!pieces) return team.take(0, loop, 1) == 0 ? team.count(loop, 0, 0) : team.await(loop);
  for (int i = 0; i < size; ++i) {
    const int owner = (rank + i) % size, first = team.first_of(owner, pieces);
    const int count = team.first_of(owner + 1, pieces) - first;
    for (int k; (k = team.take(owner, loop, count)) >= 0;) {
      const int begin = (first + k) * grain, end = begin + grain < n ? begin + grain : n;
      f(begin, end);
      team.count(loop, end - begin, n);
    }
  }
  team.await(loop);
}

}  // namespace martlet
