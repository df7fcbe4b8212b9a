// torch's CPU wheels bring a libgomp. A module linked with -fopenmp may get a second copy with a second pool, which
// fights the first for the cores and ignores torch.set_num_threads. So its entry points are looked up in the process
// instead; where there are none (conda's libiomp, macOS), everything runs in the calling thread.

#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <type_traits>

namespace pywm::cpu {
namespace {

// Below this many elements a fork and join (1 to 2 µs, more on a busy machine) costs more than it saves.
constexpr int64_t kParallelWork = 32768;

std::atomic<bool> g_forked{false};

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;

  OpenMP() {
    void* handle = RTLD_DEFAULT;
    if (!dlsym(handle, "GOMP_parallel")) {
      handle = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_NOW);
      if (!handle) return;
    }
    const auto find = [handle](auto& slot, const char* name) {
      slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(dlsym(handle, name));
      return slot != nullptr;
    };
    if (!(find(thread_num, "omp_get_thread_num") && find(num_threads, "omp_get_num_threads") &&
          find(max_threads, "omp_get_max_threads") && find(in_parallel, "omp_in_parallel") &&
          find(parallel, "GOMP_parallel")))
      parallel = nullptr;
    // libgomp's workers do not survive a fork, and waiting for them would hang: a child works alone.
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });
  }
};

const OpenMP& openmp() {
  static const OpenMP instance;
  return instance;
}

struct Job {
  int64_t n, chunk;
  void* context;
  RangeFn fn;
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

// The region may get fewer threads than were asked for: each takes every num_threads-th piece.
void run_region(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  const int64_t stride = openmp().num_threads();
  for (int64_t begin = openmp().thread_num() * job.chunk; begin < job.n; begin += stride * job.chunk) {
    try {
      job.fn(job.context, begin, std::min(job.n, begin + job.chunk));
    } catch (...) {
      if (!job.failed.exchange(true)) job.error = std::current_exception();
    }
  }
}

struct Barrier {
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int> phase{0};  // an int, for the system can wait for one
};

struct TeamJob {
  void* context;
  TeamFn fn;
  Barrier barrier;
};

void run_member(void* pointer) {
  TeamJob& job = *static_cast<TeamJob*>(pointer);
  job.fn(job.context, Team{openmp().thread_num(), openmp().num_threads(), &job.barrier});
}

}  // namespace

int64_t Team::take(int64_t* counter) {
  return std::atomic_ref<int64_t>(*counter).fetch_add(1, std::memory_order_relaxed);
}

void Team::wait(void* pointer, int64_t size) {
  // A core may have to run several members: whoever has looked this often (50 µs) sleeps until the last one comes. To
  // look on, giving the core away each time, costs a member that is just being woken on it up to 8 ms.
  constexpr int kSpins = 4000;
  Barrier& barrier = *static_cast<Barrier*>(pointer);
  const int phase = barrier.phase.load(std::memory_order_relaxed);
  if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.phase.store(phase + 1, std::memory_order_release);
    barrier.phase.notify_all();
    return;
  }
  for (int spins = 0; barrier.phase.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins >= kSpins) barrier.phase.wait(phase, std::memory_order_acquire);
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#endif
  }
}

void run_team(int64_t members, void* context, TeamFn fn) {
  members = std::min<int64_t>(members, num_threads());
  if (members <= 1) return fn(context, Team{0, 1, nullptr});
  TeamJob job{context, fn, {}};
  openmp().parallel(run_member, &job, static_cast<unsigned>(members), 0);
}

void run_short_team(int64_t members, void* context, TeamFn fn) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kAwake{1000};  // libgomp's threads look for work for 3 ms or more
  static std::atomic<Clock::rep> last{0};            // 0: never
  const Clock::rep ended = last.load(std::memory_order_relaxed);
  const bool awake = ended != 0 && Clock::now() - Clock::time_point(Clock::duration(ended)) < kAwake;
  run_team(awake ? members : 1, context, fn);
  last.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
}

int num_threads() {
  const OpenMP& omp = openmp();
  if (!omp.parallel || g_forked.load(std::memory_order_relaxed) || omp.in_parallel()) return 1;
  return std::max(1, omp.max_threads());
}

void parallel_for(int64_t n, int64_t step, int64_t work, void* context, RangeFn fn) {
  const int64_t pieces = (n + step - 1) / step;
  const int64_t threads =
      work < kParallelWork ? 1 : std::min<int64_t>({num_threads(), pieces, work / (kParallelWork / 2)});
  if (threads <= 1) {
    fn(context, 0, n);
    return;
  }
  Job job{n, (pieces + threads - 1) / threads * step, context, fn, {}, nullptr};
  openmp().parallel(run_region, &job, static_cast<unsigned>(threads), 0);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace pywm::cpu
