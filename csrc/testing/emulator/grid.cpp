// A grid: its blocks, shared out over threads of the operating system.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "testing/emulator/emulator.h"
#include "testing/emulator/scheduler.h"

namespace fastattn::emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;  // what a block can have on sm_90

// Stacks are costly to make. What is here stays until the process ends.
class Pool {
 public:
  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  std::unique_ptr<Block> take(int threads) {
    {
      const std::lock_guard lock(mutex_);
      auto& free = free_[threads];
      if (!free.empty()) {
        std::unique_ptr<Block> block = std::move(free.back());
        free.pop_back();
        return block;
      }
    }
    return std::make_unique<Block>(threads);
  }

  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    free_[static_cast<int>(block->threads.size())].push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<std::unique_ptr<Block>>> free_;
};

// The order in which blocks start: block (start + n * stride) mod blocks is the n-th.
struct BlockOrder {
  int64_t blocks, start = 0, stride = 1;

  BlockOrder(int64_t count, const Options& options) : blocks(count) {
    if (!options.random_order || blocks < 2) return;
    Random random(options.seed);
    const uint64_t limit = static_cast<uint64_t>(std::min<int64_t>(blocks, int64_t{1} << 31));
    start = static_cast<int64_t>(random.next() % limit);
    do {
      stride = static_cast<int64_t>(random.next() % limit) + 1;
    } while (std::gcd(stride, blocks) != 1);
  }
  int64_t operator[](int64_t n) const { return (start + n * stride) % blocks; }
};

}  // namespace

const char* site_kind_name(SiteKind kind) {
  switch (kind) {
    case SiteKind::kBarrier:
      return "sync_block";
    case SiteKind::kWarpBarrier:
      return "sync_warp";
    case SiteKind::kShuffle:
      return "shuffle_xor";
    case SiteKind::kLdmatrix:
      return "ldmatrix";
    case SiteKind::kMma:
      return "mma";
    case SiteKind::kCpAsync:
      return "cp_async_16";
    case SiteKind::kCpAsyncCommit:
      return "cp_async_commit";
    case SiteKind::kCpAsyncWait:
      return "cp_async_wait";
    case SiteKind::kLoadShared:
      return "load_shared";
    case SiteKind::kStoreShared:
      return "store_shared";
    case SiteKind::kGlobal:
      break;
  }
  return "global";
}

void Report::merge(const Report& other) {
  bank_conflicts_load += other.bank_conflicts_load;
  bank_conflicts_store += other.bank_conflicts_store;
  const auto key = [](const SiteCount& site) { return std::tie(site.file, site.line, site.kind); };
  for (const SiteCount& site : other.sites) {
    const auto at = std::lower_bound(sites.begin(), sites.end(), site,
                                     [&](const SiteCount& x, const SiteCount& y) { return key(x) < key(y); });
    if (at != sites.end() && key(*at) == key(site)) {
      at->calls += site.calls;
      at->bank_conflicts += site.bank_conflicts;
    } else {
      sites.insert(at, site);
    }
  }
}

Report run_grid(int64_t blocks, int threads, size_t shared_bytes, const Options& options, int os_threads,
                void (*body)(const void*), const void* arg) {
  if (threads < 32 || threads > kMaxThreads || threads % 32 != 0) {
    throw std::runtime_error(join("fastattn emulator: a block of ", threads,
                                  " threads; it is whole warps, and at most ", kMaxThreads, " threads."));
  }
  if (shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error(join("fastattn emulator: ", shared_bytes, " bytes of shared memory; a block has at most ",
                                  kMaxSharedBytes, "."));
  }

  // Blocks are handed out in one order, so that the first to fail in it is the same for every number of threads.
  const BlockOrder order(blocks, options);
  std::mutex mutex;
  int64_t next = 0, failed = blocks;
  std::string failure;
  Report total;
  const auto work = [&] {
    std::unique_ptr<Block> block = Pool::instance().take(threads);
    block->start(blocks, shared_bytes, options, body, arg);
    for (;;) {
      int64_t turn;
      {
        const std::lock_guard lock(mutex);
        if (next >= blocks || failed < blocks) break;
        turn = next++;
      }
      try {
        block->run(order[turn]);
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        if (turn < failed) {
          failed = turn;
          failure = error.what();
        }
      }
    }
    Report report = block->report();
    Pool::instance().give_back(std::move(block));
    const std::lock_guard lock(mutex);
    total.merge(report);
  };
  std::vector<std::thread> others;
  const int64_t workers = std::min<int64_t>(os_threads, blocks);
  for (int64_t n = 1; n < workers; ++n) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (failed < blocks) throw std::runtime_error(failure);
  return total;
}

}  // namespace fastattn::emulator
