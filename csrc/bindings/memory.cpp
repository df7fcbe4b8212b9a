#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

namespace pywm::bindings {
namespace {

constexpr size_t kAlignment = 64;

// Smaller blocks come back from the C library without page faults.
constexpr size_t kSmallestKept = size_t{1} << 16;
constexpr int kSlots = 32;
// From here on in pages of 2 MB, where the system has them to give: a page fault for 4 KB takes longer than a kernel
// takes for its numbers, and packed weights of some MB would not fit the table of the processor's addresses.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallestHuge = 2 * kHugePage;

// The head of a block; the numbers follow at the next multiple of kAlignment.
struct Block {
  abi::Managed managed;
  int64_t shape[kMaxRank], strides[kMaxRank];
  void* start;      // what to free
  size_t capacity;  // bytes for numbers
};

// A 32nd of the machine's memory, since what lies here idle is lost to the rest of the process; but the outputs of GAE
// at 1024 x 4096 and again as much, and not more than an imagination of 1,024 starts with 50 million parameters takes.
size_t most_bytes() {
  constexpr size_t kLeast = size_t{64} << 20, kMost = size_t{1} << 30;
  size_t bytes = kLeast;
#if defined(_SC_PHYS_PAGES)
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) bytes = static_cast<size_t>(pages) / 32 * static_cast<size_t>(page);
#endif
  return bytes < kLeast ? kLeast : bytes > kMost ? kMost : bytes;
}
const size_t kept_most = most_bytes();

// Nobody waits here: who finds it taken, by another thread or by one that a fork left behind, goes to the C library.
class Kept {
 public:
  Block* take(size_t capacity) {
    if (taken_.test_and_set(std::memory_order_acquire)) return nullptr;
    Block* found = nullptr;
    for (int i = count_ - 1; i >= 0; --i)  // the newest is the warmest
      if (slots_[i]->capacity >= capacity && slots_[i]->capacity - capacity <= capacity / 8) {
        found = slots_[i];
        remove(i);
        break;
      }
    taken_.clear(std::memory_order_release);
    return found;
  }

  void give(Block* block) {
    if (block->capacity > kept_most / 2 || taken_.test_and_set(std::memory_order_acquire)) {
      std::free(block->start);
      return;
    }
    std::array<Block*, kSlots> old;
    int evicted = 0;
    while (count_ == kSlots || (count_ > 0 && bytes_ + block->capacity > kept_most)) {
      old[evicted++] = slots_[0];
      remove(0);
    }
    slots_[count_++] = block;
    bytes_ += block->capacity;
    taken_.clear(std::memory_order_release);
    for (int i = 0; i < evicted; ++i) std::free(old[i]->start);
  }

  size_t bytes() const { return bytes_; }

 private:
  void remove(int i) {
    bytes_ -= slots_[i]->capacity;
    std::memmove(&slots_[i], &slots_[i + 1], (--count_ - i) * sizeof(Block*));
  }

  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::array<Block*, kSlots + 1> slots_{};
  int count_ = 0;
  size_t bytes_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Kept& kept = *new Kept;
std::atomic<bool> poisoned{false};

void give_back(abi::Managed* managed) {
  auto* block = static_cast<Block*>(managed->context);
  if (kKeepBlocks && block->capacity >= kSmallestKept)
    kept.give(block);
  else
    std::free(block->start);
}

Block* find_block(size_t bytes) {
  size_t capacity = bytes;
  if (kKeepBlocks && bytes >= kSmallestKept) {
    capacity = (bytes + 4095) / 4096 * 4096;  // sizes that differ a little share blocks
    if (Block* block = kept.take(capacity)) return block;
  }
  constexpr size_t kHead = (sizeof(Block) + kAlignment - 1) / kAlignment * kAlignment;
  if (capacity > std::numeric_limits<size_t>::max() / 2) return nullptr;
  const size_t total = kHead + kAlignment + capacity;
  void* start = nullptr;
#if defined(MADV_HUGEPAGE)
  if (capacity >= kSmallestHuge) {
    const size_t pages = (total + kHugePage - 1) / kHugePage * kHugePage;
    start = std::aligned_alloc(kHugePage, pages);
    if (start) madvise(start, pages, MADV_HUGEPAGE);  // a wish: without it all works as well
  }
#endif
  if (!start) start = std::malloc(total);  // aligned_alloc is slower for small blocks
  if (!start) return nullptr;
  const auto address = (reinterpret_cast<uintptr_t>(start) + kAlignment - 1) / kAlignment * kAlignment;
  auto* block = new (reinterpret_cast<void*>(address)) Block{};
  block->start = start;
  block->capacity = capacity;
  block->managed = {{1, 0}, block, give_back, 0, {}};
  block->managed.view.data = reinterpret_cast<void*>(address + kHead);
  return block;
}

}  // namespace

abi::Managed* new_block(abi::DType dtype, const int64_t* shape, int rank, void** data) {
  size_t bytes = dtype.bits / 8;
  for (int i = 0; i < rank; ++i)
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(shape[i]), &bytes)) return nullptr;
  Block* block = find_block(bytes);
  if (!block) return nullptr;
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    block->shape[i] = shape[i];
    block->strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;  // as torch counts them
  }
  abi::View& view = block->managed.view;
  view.device = {abi::kCPU, 0};
  view.ndim = rank;
  view.dtype = dtype;
  view.shape = block->shape;
  view.strides = block->strides;
  if (poisoned.load(std::memory_order_relaxed)) std::memset(view.data, 0xFF, bytes);
  *data = view.data;
  return &block->managed;
}

int64_t kept_bytes() { return static_cast<int64_t>(kept.bytes()); }

int64_t kept_limit() { return static_cast<int64_t>(kept_most); }

void poison(bool on) { poisoned.store(on, std::memory_order_relaxed); }

}  // namespace pywm::bindings
