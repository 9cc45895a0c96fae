// Tasks in phases within one parallel region: a phase starts when the one before it is done, without going back to the caller.
//
// Tasks are claimed in order from one counter. A thread that claims a task of a later phase waits until all earlier phases are done; their
// tasks were claimed before, by threads that run, so nobody waits for work that nobody does, however many threads there are: one thread
// alone runs all tasks in order. Claiming also balances cores of unequal speed.
#pragma once
#include <torch/csrc/stable/ops.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace effllm {

inline void wait_for(const std::atomic<int64_t>& done, int64_t count) {
  for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 20000) { sched_yield(); continue; }  // the thread that works is not running
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

// run(phase, task) for every task with start[phase] <= its number < start[phase + 1], on at most `threads` threads. Tasks must not throw.
template <class Run> void in_phases(const int64_t* start, int64_t phases, int64_t threads, Run&& run) {
  alignas(64) std::atomic<int64_t> next{start[0]};
  alignas(64) std::atomic<int64_t> done{start[0]};
  auto work = [&](int64_t, int64_t) {
    int64_t p = 0;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < start[phases];) {
      const int64_t before = p;
      while (task >= start[p + 1]) ++p;
      if (p != before) wait_for(done, start[p]);
      run(p, task - start[p]);
      done.fetch_add(1, std::memory_order_release);
    }
  };
  threads = std::min<int64_t>(threads, start[phases] - start[0]);
  if (threads <= 1) work(0, 1);
  else torch::stable::parallel_for(0, threads, 1, work);
}

// The same for a fixed number of phases of counts[phase] tasks.
template <int P, class Run> void in_phases(const int64_t (&counts)[P], int64_t threads, Run&& run) {
  int64_t start[P + 1] = {0};
  for (int p = 0; p < P; ++p) start[p + 1] = start[p] + counts[p];
  in_phases(start, P, threads, [&](int64_t p, int64_t task) { run(static_cast<int>(p), task); });
}

}  // namespace effllm
