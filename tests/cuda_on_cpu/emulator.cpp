// The scheduler of the emulator: fibers, barriers, warps, shared memory. See emulator.h.
//
// This file is never built with -fsanitize: the sanitizers watch the kernels, not the scheduler. With -DEMULATOR_ASAN
// it tells AddressSanitizer about the stacks of the fibers. With -DEMULATOR_TSAN it tells ThreadSanitizer that every
// CUDA thread is a thread of its own, that switching between them orders nothing, and that CUDA's barriers do; so a
// race is reported whatever the order of the threads happened to be.
#include "emulator.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define TSAN(statement) statement
#else
#define TSAN(statement)
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer of the running fiber and continues with another's.
extern "C" void emulator_swap(void** save, void* load);
asm(R"(
.text
.globl emulator_swap
.type emulator_swap,@function
emulator_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_swap,.-emulator_swap
)");
#endif

namespace emulator {

Indices current;

namespace {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kMaxShared = 227 * 1024;        // of one block, on sm_90
constexpr size_t kMaxSharedUnasked = 48 * 1024;  // without cudaFuncSetAttribute
constexpr int kPoison = 0xff;                    // fresh shared memory: as a float, NaN
constexpr unsigned long kMaxIdleSwitches = 4'000'000;

struct Block;
struct Fiber;

// One meeting point of a warp: the lanes of one mask. Two generations of slots, for a lane may be at the next meeting
// before another has read what was brought to this one.
struct Meeting {
  Collective collective{};
  unsigned arrived = 0;
  unsigned generation = 0;
  std::vector<Fiber*> waiting;
  unsigned char slots[2][kWarpLanes * kSlotBytes];
  char token[2];
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  CopyFunction function;
};

// What a fiber runs on. ThreadSanitizer takes all that runs on one for one thread: so within a launch none is used
// twice, while launches come one after the other anyway.
struct Vessel {
  char* stack = nullptr;
  [[maybe_unused]] void* tsan_fiber = nullptr;
};

struct Fiber {
  enum class State { kReady, kAtBarrier, kInWarp, kAtGridBarrier, kDone };

  Block* block = nullptr;
  Indices indices;
  unsigned linear_index = 0;
  State state = State::kReady;
  SourceLine where{"", 0};
  int predicate = 0;
  bool fenced = false;
  Meeting* meeting = nullptr;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> committed_copies;

  Vessel vessel;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  [[maybe_unused]] void* asan_fake_stack = nullptr;
};

struct SharedArray {
  const void* key;
  void* memory;
};

struct Block {
  uint3 index;
  unsigned alive = 0;
  unsigned at_barrier = 0;
  unsigned barrier_generation = 0;
  int barrier_count[2] = {0, 0};
  char barrier_token[2];
  std::vector<Fiber*> fibers;
  std::unordered_map<uint64_t, std::unique_ptr<Meeting>> meetings;  // by warp and mask
  std::vector<SharedArray> static_shared;
  size_t static_shared_bytes = 0;
  void* dynamic_shared = nullptr;
};

// The state of the one launch that runs, and what outlives it.
struct Scheduler {
  Order order = Order::kForward;
  uint64_t seed = 1;
  unsigned resident_blocks = 1;
  std::unordered_map<const void*, size_t> allowed_dynamic_shared;
  std::vector<Vessel> free_vessels;
  std::vector<Vessel> used_vessels;  // under ThreadSanitizer: by this launch

  Launch launch{};
  const std::function<void()>* body = nullptr;
  std::mt19937_64 random;
  std::vector<Fiber*> ready;
  size_t ready_head = 0;
  std::vector<Block*> resident;
  Fiber* running = nullptr;
  unsigned grid_alive = 0;
  unsigned at_grid_barrier = 0;
  unsigned grid_generation = 0;
  char error[700] = "";

#if defined(__x86_64__)
  void* main_stack_pointer = nullptr;
#else
  ucontext_t main_context;
#endif
  [[maybe_unused]] void* asan_main_fake_stack = nullptr;
  [[maybe_unused]] const void* asan_main_stack = nullptr;
  [[maybe_unused]] size_t asan_main_stack_bytes = 0;
  [[maybe_unused]] void* tsan_main_fiber = nullptr;
};
Scheduler g;

// What ThreadSanitizer is told to order by: addresses of things that nobody reads.
[[maybe_unused]] char launch_token, end_token, grid_token[2];

// While one lives, ThreadSanitizer neither records accesses nor takes fresh memory for written by who allocates it.
struct Untracked {
  Untracked() {
    TSAN(AnnotateIgnoreReadsBegin(__FILE__, __LINE__));
    TSAN(AnnotateIgnoreWritesBegin(__FILE__, __LINE__));
  }
  ~Untracked() {
    TSAN(AnnotateIgnoreWritesEnd(__FILE__, __LINE__));
    TSAN(AnnotateIgnoreReadsEnd(__FILE__, __LINE__));
  }
};

// ---- Fibers -------------------------------------------------------------------------------------------------------

void switch_to_scheduler() {
  [[maybe_unused]] Fiber* fiber = g.running;
  TSAN(__tsan_switch_to_fiber(g.tsan_main_fiber, 1));  // 1: orders nothing
#if defined(EMULATOR_ASAN)
  void** keep = fiber->state == Fiber::State::kDone ? nullptr : &fiber->asan_fake_stack;
  __sanitizer_start_switch_fiber(keep, g.asan_main_stack, g.asan_main_stack_bytes);
#endif
#if defined(__x86_64__)
  emulator_swap(&fiber->stack_pointer, g.main_stack_pointer);
#else
  swapcontext(&fiber->context, &g.main_context);
#endif
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(fiber->asan_fake_stack, nullptr, nullptr);
#endif
}

void run(Fiber* fiber) {
  g.running = fiber;
  current = fiber->indices;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&g.asan_main_fake_stack, fiber->vessel.stack, kStackBytes);
#endif
  TSAN(__tsan_switch_to_fiber(fiber->vessel.tsan_fiber, 1));
#if defined(__x86_64__)
  emulator_swap(&g.main_stack_pointer, fiber->stack_pointer);
#else
  swapcontext(&g.main_context, &fiber->context);
#endif
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(g.asan_main_fake_stack, nullptr, nullptr);
#endif
  g.running = nullptr;
}

extern "C" void emulator_fiber_entry() {
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &g.asan_main_stack, &g.asan_main_stack_bytes);
#endif
  TSAN(__tsan_acquire(&launch_token));
  (*g.body)();
  cp_async_commit();  // what is still under way lands now
  cp_async_wait(0);
  TSAN(__tsan_release(&end_token));
  g.running->state = Fiber::State::kDone;
  switch_to_scheduler();
  std::abort();  // a fiber that is done is never resumed
}

Vessel take_vessel() {
  if (g.free_vessels.empty()) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: out of memory for stacks");
    mprotect(memory, kGuardBytes, PROT_NONE);
    Vessel vessel{static_cast<char*>(memory)};
    TSAN(vessel.tsan_fiber = __tsan_create_fiber(0));
    return vessel;
  }
  const Vessel vessel = g.free_vessels.back();
  g.free_vessels.pop_back();
#if defined(EMULATOR_ASAN)
  // The last user's frames never returned, so their redzones still stand.
  __asan_unpoison_memory_region(vessel.stack + kGuardBytes, kStackBytes - kGuardBytes);
#endif
  return vessel;
}

void give_back([[maybe_unused]] Fiber* fiber) {
#if defined(EMULATOR_TSAN)
  if (fiber->state != Fiber::State::kDone) {
    // Stopped by an error: for the host, whatever it did comes before the end of the launch all the same.
    __tsan_switch_to_fiber(fiber->vessel.tsan_fiber, 1);
    __tsan_release(&end_token);
    __tsan_switch_to_fiber(g.tsan_main_fiber, 1);
    __tsan_destroy_fiber(fiber->vessel.tsan_fiber);
    munmap(fiber->vessel.stack, kStackBytes);
    return;
  }
  g.used_vessels.push_back(fiber->vessel);
#else
  g.free_vessels.push_back(fiber->vessel);
#endif
}

Fiber* make_fiber(Block* block, unsigned linear_index) {
  auto* fiber = new Fiber;
  const dim3 block_dim = g.launch.block;
  fiber->block = block;
  fiber->linear_index = linear_index;
  fiber->indices.block = block->index;
  fiber->indices.block_dim = block_dim;
  fiber->indices.grid_dim = g.launch.grid;
  fiber->indices.thread = {linear_index % block_dim.x, linear_index / block_dim.x % block_dim.y,
                           linear_index / block_dim.x / block_dim.y};
  fiber->vessel = take_vessel();
#if defined(__x86_64__)
  // What emulator_swap pops: six registers and the address to return to; above it a null frame, 16-byte aligned.
  void** top = reinterpret_cast<void**>(fiber->vessel.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(emulator_fiber_entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->vessel.stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->context, emulator_fiber_entry, 0);
#endif
#if defined(EMULATOR_TSAN)
  char name[80];
  const uint3 b = block->index, t = fiber->indices.thread;
  std::snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
  __tsan_set_fiber_name(fiber->vessel.tsan_fiber, name);
#endif
  return fiber;
}

// ---- Who runs next ------------------------------------------------------------------------------------------------

void make_ready(Fiber* fiber) {
  fiber->state = Fiber::State::kReady;
  g.ready.push_back(fiber);
}

void wake(std::vector<Fiber*> fibers) {
  if (g.order == Order::kReverse) std::reverse(fibers.begin(), fibers.end());
  for (Fiber* fiber : fibers) make_ready(fiber);
}

Fiber* next_ready() {
  if (g.ready_head == g.ready.size()) return nullptr;
  if (g.order == Order::kRandom) {
    const size_t choice = g.ready_head + g.random() % (g.ready.size() - g.ready_head);
    std::swap(g.ready[g.ready_head], g.ready[choice]);
  }
  Fiber* fiber = g.ready[g.ready_head++];
  if (g.ready_head > 4096 && g.ready_head * 2 > g.ready.size()) {
    g.ready.erase(g.ready.begin(), g.ready.begin() + static_cast<std::ptrdiff_t>(g.ready_head));
    g.ready_head = 0;
  }
  return fiber;
}

bool same_line(SourceLine a, SourceLine b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

__attribute__((format(printf, 1, 2))) void set_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(g.error, sizeof g.error, format, arguments);
  va_end(arguments);
}

// ---- Barriers -----------------------------------------------------------------------------------------------------

void release_barrier_if_full(Block* block) {
  if (block->at_barrier == 0 || block->at_barrier != block->alive) return;
  std::vector<Fiber*> waiting;
  int count = 0;
  for (Fiber* fiber : block->fibers) {
    if (fiber->state != Fiber::State::kAtBarrier) continue;
    if (!waiting.empty() && !same_line(fiber->where, waiting[0]->where)) {
      const Fiber* first = waiting[0];
      set_error("barrier divergence in block (%u,%u,%u): thread %u waits at %s:%d, thread %u at %s:%d", block->index.x,
                block->index.y, block->index.z, first->linear_index, first->where.file, first->where.line,
                fiber->linear_index, fiber->where.file, fiber->where.line);
      return;
    }
    waiting.push_back(fiber);
    count += fiber->predicate;
  }
  block->at_barrier = 0;
  block->barrier_count[block->barrier_generation % 2] = count;
  ++block->barrier_generation;
  wake(std::move(waiting));
}

void release_grid_if_full() {
  if (g.at_grid_barrier == 0 || g.at_grid_barrier != g.grid_alive) return;
  std::vector<Fiber*> waiting;
  for (Block* block : g.resident) {
    for (Fiber* fiber : block->fibers) {
      if (fiber->state == Fiber::State::kAtGridBarrier) waiting.push_back(fiber);
    }
  }
  g.at_grid_barrier = 0;
  ++g.grid_generation;
  wake(std::move(waiting));
}

void park(Fiber::State state, SourceLine where) {
  g.running->state = state;
  g.running->where = where;
  switch_to_scheduler();
}

// ---- Blocks -------------------------------------------------------------------------------------------------------

// Of exactly this size, so that ASan's redzone begins right behind it.
void* poisoned_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes)) std::abort();
  std::memset(memory, kPoison, bytes);
  return memory;
}

void start_block(unsigned linear_index) {
  const Untracked untracked;
  const dim3 grid = g.launch.grid;
  auto* block = new Block;
  block->index = {linear_index % grid.x, linear_index / grid.x % grid.y, linear_index / grid.x / grid.y};
  if (g.launch.dynamic_shared_bytes) block->dynamic_shared = poisoned_memory(g.launch.dynamic_shared_bytes);
  const unsigned threads = g.launch.block.x * g.launch.block.y * g.launch.block.z;
  for (unsigned i = 0; i < threads; ++i) block->fibers.push_back(make_fiber(block, i));
  block->alive = threads;
  g.resident.push_back(block);
  wake(block->fibers);
}

void free_block(Block* block) {
  for (Fiber* fiber : block->fibers) {
    give_back(fiber);
    delete fiber;
  }
  for (const SharedArray& array : block->static_shared) std::free(array.memory);
  std::free(block->dynamic_shared);
  g.resident.erase(std::find(g.resident.begin(), g.resident.end(), block));
  delete block;
}

// Names every place where threads wait, with one of them.
void report_deadlock() {
  static const char* const kStates[] = {"ready", "__syncthreads", "a warp collective", "grid.sync", "done"};
  struct Place {
    const Fiber* example;
    unsigned threads;
  };
  std::vector<Place> places;
  for (const Block* block : g.resident) {
    for (const Fiber* fiber : block->fibers) {
      if (fiber->state == Fiber::State::kDone) continue;
      const auto same_place = [&](const Place& place) {
        return place.example->state == fiber->state && same_line(place.example->where, fiber->where);
      };
      const auto place = std::find_if(places.begin(), places.end(), same_place);
      if (place == places.end()) {
        places.push_back({fiber, 1});
      } else {
        ++place->threads;
      }
    }
  }
  std::string text = "deadlock, no thread can run";
  for (const auto& [fiber, threads] : places) {
    char line[400];
    const uint3 block = fiber->block->index;
    std::snprintf(line, sizeof line, "; %u in %s at %s:%d, thread %u of block (%u,%u,%u) for one", threads,
                  kStates[static_cast<int>(fiber->state)], fiber->where.file, fiber->where.line, fiber->linear_index,
                  block.x, block.y, block.z);
    text += line;
  }
  set_error("%s", text.c_str());
}

void check_launch_limits() {
  const Launch& launch = g.launch;
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const bool grid_fits = launch.grid.x <= 0x7fffffffu && launch.grid.y <= 65535 && launch.grid.z <= 65535;
  if (blocks == 0 || !grid_fits || threads == 0 || threads > kMaxThreads || launch.block.z > 64) {
    fail("%s: invalid launch of %u x %u x %u blocks of %u x %u x %u threads", launch.name, launch.grid.x, launch.grid.y,
         launch.grid.z, launch.block.x, launch.block.y, launch.block.z);
  }
  if (launch.dynamic_shared_bytes > kMaxSharedUnasked) {
    const auto allowed = g.allowed_dynamic_shared.find(launch.kernel);
    if (allowed == g.allowed_dynamic_shared.end() || allowed->second < launch.dynamic_shared_bytes) {
      fail("%s: %zu bytes of dynamic shared memory without cudaFuncSetAttribute", launch.name,
           launch.dynamic_shared_bytes);
    }
  }
}

// After `fiber` gave up control: who can go on because of it?
void account_for(Fiber* fiber) {
  Block* block = fiber->block;
  switch (fiber->state) {
    case Fiber::State::kReady:
      g.ready.push_back(fiber);
      break;
    case Fiber::State::kAtBarrier:
      ++block->at_barrier;
      release_barrier_if_full(block);
      break;
    case Fiber::State::kAtGridBarrier:
      ++g.at_grid_barrier;
      release_grid_if_full();
      break;
    case Fiber::State::kInWarp: {
      Meeting* meeting = fiber->meeting;
      meeting->waiting.push_back(fiber);
      if (meeting->arrived == meeting->collective.mask) {
        meeting->arrived = 0;
        ++meeting->generation;
        wake(std::exchange(meeting->waiting, {}));
      }
      break;
    }
    case Fiber::State::kDone:
      --block->alive;
      --g.grid_alive;
      if (block->alive == 0) {
        free_block(block);
      } else {
        release_barrier_if_full(block);
      }
      release_grid_if_full();
      break;
  }
}

void run_grid() {
  const Untracked untracked;
  const unsigned blocks = g.launch.grid.x * g.launch.grid.y * g.launch.grid.z;
  const unsigned threads = g.launch.block.x * g.launch.block.y * g.launch.block.z;
  const unsigned resident_limit = g.launch.cooperative ? blocks : g.resident_blocks;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = g.order == Order::kReverse ? blocks - 1 - i : i;
  if (g.order == Order::kRandom) std::shuffle(order.begin(), order.end(), g.random);
  g.grid_alive = blocks * threads;

  unsigned started = 0;
  unsigned long idle_switches = 0;
  while (g.error[0] == '\0') {
    while (started < blocks && g.resident.size() < resident_limit) start_block(order[started++]);
    Fiber* fiber = next_ready();
    if (fiber == nullptr) {
      if (!g.resident.empty()) report_deadlock();
      break;
    }
    run(fiber);
    if (g.error[0] != '\0') break;
    idle_switches = fiber->state == Fiber::State::kReady ? idle_switches + 1 : 0;
    if (idle_switches > kMaxIdleSwitches) set_error("livelock: threads spin on what no thread changes");
    account_for(fiber);
  }
  // Only after an error: what these threads had on their stacks is lost.
  while (!g.resident.empty()) free_block(g.resident.back());
  g.free_vessels.insert(g.free_vessels.end(), g.used_vessels.begin(), g.used_vessels.end());
  g.used_vessels.clear();
}

}  // namespace

// ---- The interface ------------------------------------------------------------------------------------------------

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  {
    const Untracked untracked;
    std::vsnprintf(g.error, sizeof g.error, format, arguments);
  }
  va_end(arguments);
  if (g.running == nullptr) throw std::runtime_error(g.error);
  for (;;) switch_to_scheduler();  // an exception must not cross fibers; the scheduler throws it
}

void set_schedule(Order order, uint64_t seed, int resident_blocks) {
  g.order = order;
  g.seed = seed;
  g.resident_blocks = static_cast<unsigned>(std::max(resident_blocks, 1));
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) fail("%zu bytes of dynamic shared memory are more than any device has", bytes);
  g.allowed_dynamic_shared[kernel] = bytes;
}

void launch(const Launch& launch, const std::function<void()>& body) {
  g.launch = launch;
  g.body = &body;
  g.random.seed(g.seed);
  g.ready.clear();
  g.ready_head = 0;
  g.at_grid_barrier = 0;
  g.grid_generation = 0;
  g.error[0] = '\0';
  check_launch_limits();
  // What the host and earlier launches wrote is visible to every block; the blocks are not ordered among themselves.
  TSAN(g.tsan_main_fiber = __tsan_get_current_fiber());
  TSAN(__tsan_release(&launch_token));
  run_grid();
  TSAN(__tsan_acquire(&end_token));
  if (g.error[0] != '\0') throw std::runtime_error(std::string(launch.name) + ": " + g.error);
}

unsigned lane() { return g.running->linear_index % kWarpLanes; }

void yield() {
  g.running->state = Fiber::State::kReady;
  switch_to_scheduler();
}

void set_fence() { g.running->fenced = true; }

bool take_fence() { return std::exchange(g.running->fenced, false); }

int sync_threads_count(int predicate, SourceLine where) {
  Block* block = g.running->block;
  const unsigned parity = block->barrier_generation % 2;
  g.running->predicate = predicate != 0;
  TSAN(__tsan_release(&block->barrier_token[parity]));
  park(Fiber::State::kAtBarrier, where);
  TSAN(__tsan_acquire(&block->barrier_token[parity]));
  return block->barrier_count[parity];
}

void sync_threads(SourceLine where) { sync_threads_count(0, where); }

void grid_sync(SourceLine where) {
  if (!g.launch.cooperative) fail("%s:%d: grid.sync in a launch that is not cooperative", where.file, where.line);
  [[maybe_unused]] const unsigned parity = g.grid_generation % 2;
  TSAN(__tsan_release(&grid_token[parity]));
  park(Fiber::State::kAtGridBarrier, where);
  TSAN(__tsan_acquire(&grid_token[parity]));
}

const unsigned char* meet(const Collective& collective, const void* mine) {
  Fiber* fiber = g.running;
  const SourceLine where = collective.where;
  const unsigned lane_index = lane();
  const unsigned warp = fiber->linear_index / kWarpLanes;
  if (!has_lane(collective.mask, lane_index)) {
    fail("%s:%d: lane %u calls a warp collective whose mask %08x leaves it out", where.file, where.line, lane_index,
         collective.mask);
  }
  Meeting* meeting = nullptr;
  {
    const Untracked untracked;
    auto& slot = fiber->block->meetings[uint64_t{warp} << 32 | collective.mask];
    if (!slot) slot = std::make_unique<Meeting>();
    meeting = slot.get();
  }
  if (meeting->arrived == 0) {
    meeting->collective = collective;
  } else if (meeting->collective.op != collective.op || meeting->collective.bytes != collective.bytes ||
             !same_line(meeting->collective.where, where)) {
    fail("warp divergence: lane %u is at %s:%d while others of its warp wait at %s:%d", lane_index, where.file,
         where.line, meeting->collective.where.file, meeting->collective.where.line);
  }
  const unsigned parity = meeting->generation % 2;
  {
    const Untracked untracked;
    std::memcpy(meeting->slots[parity] + lane_index * kSlotBytes, mine, collective.bytes);
  }
  meeting->arrived |= 1u << lane_index;
  fiber->meeting = meeting;
  if (collective.orders_memory) {
    TSAN(__tsan_release(&meeting->token[parity]));
  }
  park(Fiber::State::kInWarp, where);
  if (collective.orders_memory) {
    TSAN(__tsan_acquire(&meeting->token[parity]));
  }
  return meeting->slots[parity];
}

void* shared_static(const void* key, size_t bytes) {
  Block* block = g.running->block;
  for (const SharedArray& array : block->static_shared) {
    if (array.key == key) return array.memory;
  }
  block->static_shared_bytes += bytes;
  if (block->static_shared_bytes > kMaxSharedUnasked) {
    fail("%zu bytes of static shared memory, but a block has %zu", block->static_shared_bytes, kMaxSharedUnasked);
  }
  const Untracked untracked;
  block->static_shared.push_back({key, poisoned_memory(bytes)});
  return block->static_shared.back().memory;
}

void* shared_dynamic() { return g.running->block->dynamic_shared; }

// A copy happens as late as it may, at the wait for its group (in random order now and then at once), so that a missing
// commit or wait shows. As on the device, a wait covers only what was committed.
void cp_async(void* to, const void* from, unsigned bytes, CopyFunction copy) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    fail("cp.async of %u bytes between addresses that are not aligned to them", bytes);
  }
  if (g.order == Order::kRandom && g.random() % 4 == 0) {
    copy(to, from, bytes);
    return;
  }
  const Untracked untracked;
  g.running->open_copies.push_back({to, from, bytes, copy});
}

void cp_async_commit() {
  const Untracked untracked;
  g.running->committed_copies.push_back(std::exchange(g.running->open_copies, {}));
}

void cp_async_wait(unsigned keep) {
  Fiber* fiber = g.running;
  while (fiber->committed_copies.size() > keep) {
    for (const Copy& copy : fiber->committed_copies.front()) copy.function(copy.to, copy.from, copy.bytes);
    const Untracked untracked;
    fiber->committed_copies.erase(fiber->committed_copies.begin());
  }
}

}  // namespace emulator
