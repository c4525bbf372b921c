// The fibers of one block, who runs next, and the primitives as a fiber meets them. See emulator.h.
//
// The lanes of a warp run one after the other up to the next collective; the last to arrive computes it for all lanes and
// goes on. Warps change places at barriers and, in random order, after some of the collectives.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "testing/emulator/emulator.h"
#include "testing/emulator/fiber.h"
#include "testing/emulator/fragments.h"
#include "testing/emulator/primitives.h"
#include "testing/emulator/shared_memory.h"

namespace fastattn::emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;  // what a block can have on sm_90
// Where the window of shared memory begins: a multiple of what ptx.cuh promises, 128, and of no more.
constexpr uint32_t kSharedBase = 1024 + 128;
constexpr uint32_t kAllLanes = 0xffffffffu;
#if defined(FASTATTN_FIBER_ASAN)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// Unwinds the fibers of a block that has failed elsewhere.
struct Cancelled {};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // splitmix64
  uint64_t next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
  }

 private:
  uint64_t state_;
};

std::string short_path(const std::string& path) {
  const size_t at = path.rfind("csrc/");
  return at == std::string::npos ? path : path.substr(at);
}

std::string describe(Site site) { return short_path(site.file) + ":" + std::to_string(site.line); }

// ---- Call sites ----------------------------------------------------------------------------------------------------

struct SiteInfo {
  Site site;
  SiteKind kind;
  bool is_skipped;
  uint64_t calls = 0, bank_conflicts = 0;
};

class SiteTable {
 public:
  void start(const SkipSite& skip) {
    sites_.clear();
    index_.clear();
    std::fill(std::begin(recent_), std::end(recent_), Recent{});
    skip_ = skip;
  }

  uint32_t find(Site site, SiteKind kind) {
    const uintptr_t hash = reinterpret_cast<uintptr_t>(site.file) + static_cast<uintptr_t>(site.line) * 13 +
                           static_cast<uintptr_t>(kind) * 101;
    Recent& recent = recent_[hash % kRecent];
    if (recent.file != site.file || recent.line != site.line || recent.kind != kind) [[unlikely]] {
      recent = {site.file, site.line, kind, look_up(site, kind)};
    }
    return recent.id;
  }
  SiteInfo& operator[](uint32_t id) { return sites_[id]; }
  const std::vector<SiteInfo>& all() const { return sites_; }

 private:
  static constexpr size_t kRecent = 256;
  struct Recent {
    const char* file = nullptr;
    int line = 0;
    SiteKind kind = SiteKind::kBarrier;
    uint32_t id = 0;
  };

  uint32_t look_up(Site site, SiteKind kind) {
    const auto [at, is_new] = index_.try_emplace({site.file, site.line, kind}, static_cast<uint32_t>(sites_.size()));
    if (is_new) {
      const std::string file = site.file;
      const bool is_skipped = skip_.line == site.line && skip_.kind == kind && file.ends_with(skip_.file);
      sites_.push_back({site, kind, is_skipped});
    }
    return at->second;
  }

  Recent recent_[kRecent];
  std::map<std::tuple<std::string, int, SiteKind>, uint32_t> index_;
  std::vector<SiteInfo> sites_;
  SkipSite skip_;
};

// ---- Bank conflicts ------------------------------------------------------------------------------------------------

// Cycles beyond the first that eight accesses of 16 bytes take together: there are eight groups of four banks.
int chunk_conflicts(const uint32_t* at, uint32_t lanes) {
  uint32_t groups = 0;
  for (uint32_t n = 0; n < 8; ++n) {
    if (lanes >> n & 1) groups |= 1u << (at[n] / 16 % 8);
  }
  if (std::popcount(groups) == std::popcount(lanes & 0xffu)) return 0;
  int most = 1, used[8] = {};
  for (uint32_t n = 0; n < 8; ++n) {
    bool is_first = lanes >> n & 1;  // of the lanes that read this address
    for (uint32_t m = 0; m < n; ++m) is_first = is_first && !((lanes >> m & 1) && at[m] == at[n]);
    if (is_first) most = std::max(most, ++used[at[n] / 16 % 8]);
  }
  return most - 1;
}

// The same for a warp's accesses of four bytes, in 32 banks.
int word_conflicts(const uint32_t* at, uint32_t lanes) {
  uint32_t banks = 0;
  for (uint32_t n = 0; n < 32; ++n) {
    if (lanes >> n & 1) banks |= 1u << (at[n] / 4 % 32);
  }
  if (std::popcount(banks) == std::popcount(lanes)) return 0;
  int most = 1, used[32] = {};
  for (uint32_t n = 0; n < 32; ++n) {
    bool is_first = lanes >> n & 1;
    for (uint32_t m = 0; m < n; ++m) is_first = is_first && !((lanes >> m & 1) && at[m] == at[n]);
    if (is_first) most = std::max(most, ++used[at[n] / 4 % 32]);
  }
  return most - 1;
}

// The loads and stores of a warp since its last collective. Lanes run one by one, so that what they would do together is
// put together here: the n-th time that one lane is at a call site goes with the n-th time that another is.
class AccessLog {
 public:
  void add(uint32_t lane, uint32_t site, uint32_t at, bool is_chunk) {
    const uint32_t key = site << 1 | (is_chunk ? 1u : 0u), bit = 1u << lane;
    uint32_t n = place_[lane];
    if (!(parted_ & bit) && n < size_ && entries_[n].key != key) parted_ |= bit;
    if (parted_ & bit) [[unlikely]] {
      for (n = 0; n < size_ && (entries_[n].key != key || (entries_[n].lanes & bit)); ++n) {
      }
    } else {
      ++place_[lane];
    }
    if (n == size_) {
      if (size_ == entries_.size()) entries_.emplace_back();
      entries_[size_].key = key;
      entries_[size_].lanes = 0;
      ++size_;
    }
    entries_[n].lanes |= bit;
    entries_[n].at[lane] = at;
  }

  bool is_empty() const { return size_ == 0; }

  void flush(SiteTable& sites) {
    for (uint32_t n = 0; n < size_; ++n) {
      const Entry& entry = entries_[n];
      SiteInfo& info = sites[entry.key >> 1];
      info.calls += static_cast<uint64_t>(std::popcount(entry.lanes));
      int conflicts = 0;
      if (entry.key & 1) {
        for (uint32_t lane = 0; lane < 32; lane += 8) {
          conflicts += chunk_conflicts(entry.at + lane, entry.lanes >> lane & 0xffu);
        }
      } else {
        conflicts = word_conflicts(entry.at, entry.lanes);
      }
      info.bank_conflicts += static_cast<uint64_t>(conflicts);
    }
    clear();
  }

  void clear() {
    size_ = 0;
    parted_ = 0;
    std::fill(std::begin(place_), std::end(place_), 0u);
  }

 private:
  struct Entry {
    uint32_t key;  // the call site, and whether it is 16 bytes
    uint32_t lanes;
    uint32_t at[32];
  };

  std::vector<Entry> entries_;
  uint32_t size_ = 0;
  uint32_t place_[32] = {};  // the entry that the lane's next access is expected at
  uint32_t parted_ = 0;      // lanes whose accesses are not, one by one, those of the lanes before them
};

// ---- Threads -------------------------------------------------------------------------------------------------------

struct Copy {
  const void* src;
  uint32_t dst;
  uint8_t bytes;
  bool has_landed;
};

struct Block;
struct Warp;

struct Thread {
  Context context;
  Warp* warp = nullptr;
  int index = 0;
  uint32_t lane = 0, bit = 0;
  bool is_running_body = false;
  std::vector<Copy> copies;         // not waited for, in the order of issue
  std::vector<uint32_t> copies_of;  // how many of them are in each committed group; the rest is in the open one
};

struct Warp {
  MmaOperands mma;
  uint32_t value[32];  // what the lanes bring to a collective
  uint32_t lane_mask[32];
  uint32_t result[4][32];

  Block* block = nullptr;
  Thread* lanes = nullptr;
  uint32_t index = 0;
  // A lane is in one of these.
  uint32_t runnable = 0, arrived = 0, at_barrier = 0, exited = 0;
  SiteKind kind = SiteKind::kBarrier;  // of the collective that lanes have arrived at
  Site site{"", 0};
  Site barrier_site{"", 0};
  uint32_t stride = 1;      // the next lane to run is the next runnable one in steps of it
  uint32_t step_clock = 0;  // the clock at the warp's last sync_warp or sync_block
  AccessLog log;
};

[[gnu::tls_model("initial-exec")]] constinit thread_local Thread* current = nullptr;

// For a fiber between two blocks, which another thread of the operating system may take up: the compiler must not keep
// the address of `current` beyond a switch there.
[[gnu::noinline]] void set_current(Thread& thread) { current = &thread; }

// Stacks with a page below each that nothing may touch.
class Stacks {
 public:
  explicit Stacks(size_t count) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), count_(count) {
    void* base = mmap(nullptr, count_ * stride(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(base);
    for (size_t n = 0; n < count_; ++n) mprotect(base_ + n * stride(), page_, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() { munmap(base_, count_ * stride()); }

  unsigned char* bottom(size_t n) { return base_ + n * stride() + page_; }

 private:
  size_t stride() const { return page_ + kStackBytes; }

  size_t page_, count_;
  unsigned char* base_ = nullptr;
};

struct Block {
  explicit Block(int thread_count);

  void start(int64_t grid_blocks, size_t shared_bytes, const Options& options, void (*body)(const void*),
             const void* arg);
  void run(int64_t block_index);  // throws what the report says
  Report report();

  void fiber_main(Thread& self);

  Thread& pick_lane(Warp& warp, uint32_t start);
  Thread& pick_warp();
  void go_to(Thread& self, Thread& next);
  void finish_collective(Warp& warp, Thread& self);
  template <class Complete>
  void meet(Thread& self, SiteKind kind, Site site, Complete complete);
  void barrier(Thread& self, Site site);

  uint32_t offset_of(uint32_t at, uint32_t bytes, const char* what, Site site);
  void check(SharedMemory::Finding finding, const char* verb, uint32_t offset, Actor actor);
  void land(Copy& copy);
  void land_some(Thread& self);
  void wait_for_copies(Thread& self, size_t pending);

  [[noreturn, gnu::cold]] void fail(const std::string& what);
  std::string describe_actor(Actor actor);
  std::string describe_lanes(const Warp& warp, uint32_t lanes);
  std::string describe_state();

  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::unique_ptr<Stacks> stacks;
  Context scheduler;
  SharedMemory shared;
  SiteTable sites;
  MmaFunction mma[3];

  Options options;
  int64_t grid_blocks = 0, block_index = 0;
  void (*body)(const void*) = nullptr;
  const void* arg = nullptr;

  Random random{0};
  uint32_t runnable_warps = 0;
  int at_barrier = 0, exited = 0;
  bool is_cancelled = false;
  std::string failure;
};

// ---- Running a block -----------------------------------------------------------------------------------------------

void start_fiber() {
  Thread& self = *current;
  arrive_from_switch(self.context);
  self.warp->block->fiber_main(self);
}

Block::Block(int thread_count) {
  warps = std::vector<Warp>(static_cast<size_t>(thread_count / 32));
  threads = std::vector<Thread>(static_cast<size_t>(thread_count));
  stacks = std::make_unique<Stacks>(threads.size());
  for (size_t n = 0; n < threads.size(); ++n) {
    Thread& thread = threads[n];
    thread.warp = &warps[n / 32];
    thread.index = static_cast<int>(n);
    thread.lane = static_cast<uint32_t>(n % 32);
    thread.bit = 1u << thread.lane;
    // Tops at the same place within a page would all compete for the same few lines of the first-level cache.
    const size_t shift = n % 32 * 128;
    prepare_context(thread.context, stacks->bottom(n), kStackBytes - shift, start_fiber);
  }
  for (size_t n = 0; n < warps.size(); ++n) {
    warps[n].block = this;
    warps[n].lanes = &threads[32 * n];
    warps[n].index = static_cast<uint32_t>(n);
  }
  for (const MmaType type : {MmaType::kBf16, MmaType::kF16, MmaType::kTf32}) {
    mma[static_cast<int>(type)] = mma_function(type);
  }
}

void Block::start(int64_t grid, size_t shared_bytes, const Options& chosen, void (*kernel)(const void*),
                  const void* kernel_arg) {
  grid_blocks = grid;
  options = chosen;
  body = kernel;
  arg = kernel_arg;
  sites.start(options.skip_site);
  shared.resize(shared_bytes);
}

void Block::run(int64_t index) {
  block_index = index;
  is_cancelled = false;
  failure.clear();
  at_barrier = exited = 0;
  random = Random(options.seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(index));
  runnable_warps = warps.size() == 32 ? kAllLanes : (1u << warps.size()) - 1;
  for (Thread& thread : threads) {
    thread.is_running_body = false;
    for (const Copy& copy : thread.copies) shared.end_copy(copy.dst);  // nobody waited for it
    thread.copies.clear();
    thread.copies_of.clear();
  }
  shared.start_block();
  for (Warp& warp : warps) {
    warp.runnable = kAllLanes;
    warp.arrived = warp.at_barrier = warp.exited = 0;
    warp.stride = 1;
    warp.step_clock = shared.clock();
    warp.log.clear();
  }

  Thread& first = pick_warp();
  current = &first;
  switch_context(scheduler, first.context);

  if (!failure.empty()) {
    is_cancelled = true;
    for (Thread& thread : threads) {
      if (!thread.is_running_body) continue;
      current = &thread;
      switch_context(scheduler, thread.context);
    }
    current = nullptr;
    throw std::runtime_error(failure);
  }
  current = nullptr;
  for (Warp& warp : warps) warp.log.flush(sites);
}

// A fiber lives as long as its Block: it runs the body once for every block of the grid that it is resumed in.
void Block::fiber_main(Thread& self) {
  for (;;) {
    Context* next = &scheduler;
    self.is_running_body = true;
    std::string error;
    try {
      body(arg);
    } catch (const Cancelled&) {
    } catch (const std::exception& thrown) {
      error = thrown.what();
    } catch (...) {
      error = "the kernel threw something that is no std::exception";
    }
    self.is_running_body = false;
    if (is_cancelled) {
      // The scheduler takes back one fiber after the other.
    } else if (!error.empty()) {
      failure = error;
    } else {
      Warp& warp = *self.warp;
      warp.runnable &= ~self.bit;
      warp.exited |= self.bit;
      ++exited;
      if (warp.runnable != 0) {
        Thread& other = pick_lane(warp, self.lane);
        set_current(other);
        next = &other.context;
      } else {
        runnable_warps &= ~(1u << warp.index);
        if (warp.arrived != 0 || (runnable_warps == 0 && exited != static_cast<int>(threads.size()))) {
          failure = describe_state();
        } else if (runnable_warps != 0) {
          Thread& other = pick_warp();
          set_current(other);
          next = &other.context;
        }
      }
    }
    switch_context(self.context, *next);
  }
}

// The next lane that can run, after `start` in the warp's order. There is one.
Thread& Block::pick_lane(Warp& warp, uint32_t start) {
  uint32_t lane = start;
  do {
    lane = (lane + warp.stride) % 32;
  } while (!(warp.runnable >> lane & 1));
  return warp.lanes[lane];
}

Thread& Block::pick_warp() {
  if (!options.random_order) {
    Warp& warp = warps[static_cast<size_t>(std::countr_zero(runnable_warps))];
    return pick_lane(warp, 31);
  }
  const uint64_t drawn = random.next();
  int skip = static_cast<int>((drawn >> 32) % static_cast<uint64_t>(std::popcount(runnable_warps)));
  uint32_t left = runnable_warps;
  while (skip-- > 0) left &= left - 1;
  Warp& warp = warps[static_cast<size_t>(std::countr_zero(left))];
  warp.stride = (drawn & 31) | 1;
  return pick_lane(warp, drawn >> 5 & 31);
}

[[gnu::always_inline]] inline void Block::go_to(Thread& self, Thread& next) {
  current = &next;
  switch_context(self.context, next.context);
  if (is_cancelled) [[unlikely]]
    throw Cancelled{};
}

// ---- Collectives ---------------------------------------------------------------------------------------------------

// The lane waits until all lanes of its warp are here; the last one runs complete(warp).
template <class Complete>
[[gnu::always_inline]] inline void Block::meet(Thread& self, SiteKind kind, Site site, Complete complete) {
  Warp& warp = *self.warp;
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
  } else if (warp.kind != kind || warp.site.line != site.line || warp.site.file != site.file) [[unlikely]] {
    fail("lanes of a warp are at different collectives: " + describe_lanes(warp, warp.arrived) + " at " +
         site_kind_name(warp.kind) + " (" + describe(warp.site) + "), this one at " + site_kind_name(kind) + " (" +
         describe(site) + ")");
  }
  warp.arrived |= self.bit;
  warp.runnable &= ~self.bit;
  if (warp.runnable != 0) {
    go_to(self, pick_lane(warp, self.lane));
    return;
  }
  if (warp.arrived != kAllLanes) [[unlikely]]
    fail(describe_state());
  SiteInfo& info = sites[sites.find(site, kind)];
  info.calls += 32;
  if (!warp.log.is_empty()) warp.log.flush(sites);
  complete(warp, info);
  warp.arrived = 0;
  warp.runnable = kAllLanes;
  if (options.random_order) {
    const uint64_t drawn = random.next();
    warp.stride = (drawn & 31) | 1;
    if ((drawn >> 5 & 7) == 0) {
      Thread& next = pick_warp();
      if (&next != &self) go_to(self, next);
    }
  } else if (self.lane != 0) {
    go_to(self, warp.lanes[0]);
  }
}

void Block::barrier(Thread& self, Site site) {
  Warp& warp = *self.warp;
  SiteInfo& info = sites[sites.find(site, SiteKind::kBarrier)];
  if (info.is_skipped) return;
  land_some(self);
  if (warp.at_barrier == 0) {
    warp.barrier_site = site;
  } else if (warp.barrier_site.line != site.line || warp.barrier_site.file != site.file) {
    fail("lanes of a warp are at different barriers: " + describe_lanes(warp, warp.at_barrier) + " at " +
         describe(warp.barrier_site) + ", this one at " + describe(site));
  }
  ++info.calls;
  warp.runnable &= ~self.bit;
  warp.at_barrier |= self.bit;
  if (++at_barrier == static_cast<int>(threads.size())) {
    at_barrier = 0;
    const uint32_t clock = shared.tick_barrier();
    for (Warp& each : warps) {
      each.runnable = kAllLanes;
      each.at_barrier = 0;
      each.step_clock = clock;
      if (!each.log.is_empty()) each.log.flush(sites);
    }
    runnable_warps = warps.size() == 32 ? kAllLanes : (1u << warps.size()) - 1;
    Thread& next = pick_warp();
    if (&next != &self) go_to(self, next);
    return;
  }
  if (warp.runnable != 0) {
    go_to(self, pick_lane(warp, self.lane));
    return;
  }
  runnable_warps &= ~(1u << warp.index);
  if (warp.arrived != 0 || runnable_warps == 0) fail(describe_state());
  go_to(self, pick_warp());
}

// ---- Shared memory -------------------------------------------------------------------------------------------------

[[gnu::always_inline]] inline uint32_t Block::offset_of(uint32_t at, uint32_t bytes, const char* what, Site site) {
  const uint32_t offset = at - kSharedBase;
  if (at % bytes != 0 || at < kSharedBase || offset + uint64_t{bytes} > shared.bytes()) [[unlikely]] {
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes of shared memory at offset " +
         std::to_string(static_cast<int64_t>(at) - kSharedBase) + " of " + std::to_string(shared.bytes()) +
         (at % bytes != 0 ? ", misaligned" : ", out of bounds") + " (" + describe(site) + ")");
  }
  return offset;
}

[[gnu::always_inline]] inline void Block::check(SharedMemory::Finding finding, const char* verb, uint32_t offset,
                                                Actor actor) {
  if (finding.conflict == SharedMemory::Conflict::kNone) [[likely]]
    return;
  std::string what = "data race: " + describe_actor(actor) + " " + verb + " shared memory at offset " +
                     std::to_string(offset) + ", which " + describe_actor(finding.other);
  switch (finding.conflict) {
    case SharedMemory::Conflict::kWrite:
      what += " wrote, with no barrier between them";
      break;
    case SharedMemory::Conflict::kRead:
      what += " read, with no barrier between them";
      break;
    default:
      what += " is still copying to: no cp_async_wait of its own came in between";
  }
  fail(what);
}

void Block::land(Copy& copy) {
  unsigned char* dst = shared.data() + copy.dst;
  if (copy.bytes > 0) std::memcpy(dst, copy.src, copy.bytes);
  std::memset(dst + copy.bytes, 0, size_t{16} - copy.bytes);
  copy.has_landed = true;
}

// Where copies may land before their wait, some do.
void Block::land_some(Thread& self) {
  if (options.cp_async_timing != CopyTiming::kRandom || self.copies.empty()) return;
  const uint64_t drawn = random.next();
  if (drawn & 1) return;
  for (size_t n = 0; n < self.copies.size(); ++n) {
    Copy& copy = self.copies[n];
    if (!copy.has_landed && (drawn >> (1 + n % 63) & 1)) land(copy);
  }
}

void Block::wait_for_copies(Thread& self, size_t pending) {
  if (self.copies_of.size() <= pending) return;
  const size_t groups = self.copies_of.size() - pending;
  size_t done = 0;
  for (size_t group = 0; group < groups; ++group) {
    for (const size_t end = done + self.copies_of[group]; done < end; ++done) {
      Copy& copy = self.copies[done];
      if (!copy.has_landed) land(copy);
      if (options.detect_races) shared.end_copy(copy.dst);
    }
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(done));
  self.copies_of.erase(self.copies_of.begin(), self.copies_of.begin() + static_cast<ptrdiff_t>(groups));
}

Actor make_actor(const Thread& self, uint32_t site) { return static_cast<Actor>(self.index) | site << kThreadBits; }

// ---- Reports -------------------------------------------------------------------------------------------------------

void Block::fail(const std::string& what) {
  throw std::runtime_error("fastattn emulator: block " + std::to_string(block_index) + ", thread " +
                           std::to_string(current->index) + ": " + what + ".");
}

std::string Block::describe_actor(Actor actor) {
  const SiteInfo& info = sites[actor_site(actor)];
  return "thread " + std::to_string(actor_thread(actor)) + " (" + site_kind_name(info.kind) + " at " +
         describe(info.site) + ")";
}

std::string Block::describe_lanes(const Warp& warp, uint32_t lanes) {
  std::string text;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    uint32_t last = lane;
    while (last < 31 && (lanes >> (last + 1) & 1)) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(32 * warp.index + lane);
    if (last > lane) text += "-" + std::to_string(32 * warp.index + last);
    lane = last;
  }
  return "threads " + text;
}

std::string Block::describe_state() {
  std::string text = "fastattn emulator: block " + std::to_string(block_index) + ": deadlock: ";
  std::string parts;
  const auto add = [&](const Warp& warp, uint32_t lanes, const std::string& what) {
    if (lanes != 0) parts += (parts.empty() ? "" : "; ") + describe_lanes(warp, lanes) + " " + what;
  };
  for (const Warp& warp : warps) {
    add(warp, warp.arrived, std::string("wait at ") + site_kind_name(warp.kind) + " (" + describe(warp.site) + ")");
    add(warp, warp.at_barrier, "wait at sync_block (" + describe(warp.barrier_site) + ")");
    add(warp, warp.exited, "have exited");
    add(warp, warp.runnable, "could run");
  }
  return text + parts + ".";
}

Report Block::report() {
  Report report;
  for (const SiteInfo& info : sites.all()) {
    report.sites.push_back({short_path(info.site.file), info.site.line, info.kind, info.calls, info.bank_conflicts});
    (info.kind == SiteKind::kStoreShared ? report.bank_conflicts_store : report.bank_conflicts_load) +=
        info.bank_conflicts;
  }
  Report sorted;
  sorted.merge(report);
  return sorted;
}

// ---- Blocks to reuse -----------------------------------------------------------------------------------------------

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

}  // namespace

// ---- The primitives ------------------------------------------------------------------------------------------------

int thread_index() { return current->index; }
int64_t block_index() { return current->warp->block->block_index; }
int64_t grid_blocks() { return current->warp->block->grid_blocks; }
uint32_t shared_base() { return kSharedBase; }

void sync_block(Site site) {
  Thread& self = *current;
  self.warp->block->barrier(self, site);
}

void sync_warp(Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  if (block.sites[block.sites.find(site, SiteKind::kWarpBarrier)].is_skipped) return;
  block.meet(self, SiteKind::kWarpBarrier, site, [&](Warp& warp, SiteInfo&) { warp.step_clock = block.shared.tick(); });
}

uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  warp.value[self.lane] = x;
  warp.lane_mask[self.lane] = static_cast<uint32_t>(lane_mask);
  warp.block->meet(self, SiteKind::kShuffle, site, [](Warp& w, SiteInfo&) {
    for (uint32_t lane = 0; lane < 32; ++lane) w.result[0][lane] = w.value[(lane ^ w.lane_mask[lane]) % 32];
  });
  return warp.result[0][self.lane];
}

void ldmatrix(uint32_t* r, uint32_t row, bool is_transposed, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  warp.value[self.lane] = block.offset_of(row, 16, "ldmatrix", site);
  block.meet(self, SiteKind::kLdmatrix, site, [&](Warp& w, SiteInfo& info) {
    if (block.options.detect_races) {
      const uint32_t id = block.sites.find(site, SiteKind::kLdmatrix);
      for (uint32_t lane = 0; lane < 32; ++lane) {
        const Actor actor = make_actor(w.lanes[lane], id);
        block.check(block.shared.read_chunk_as_warp(w.value[lane], {actor, w.step_clock}), "reads", w.value[lane],
                    actor);
      }
    }
    if (block.options.count_bank_conflicts) {
      int conflicts = 0;
      for (uint32_t lane = 0; lane < 32; lane += 8) conflicts += chunk_conflicts(w.value + lane, 0xff);
      info.bank_conflicts += static_cast<uint64_t>(conflicts);
    }
    const unsigned char* data = block.shared.data();
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      // One lane's word is two neighbours of a row, of the matrix or of its transpose.
      alignas(16) uint16_t rows[8][8];
      for (uint32_t n = 0; n < 8; ++n) std::memcpy(rows[n], data + w.value[8 * matrix + n], 16);
      if (is_transposed) {
        transpose_8x8(&rows[0][0], reinterpret_cast<uint16_t*>(w.result[matrix]));
      } else {
        std::memcpy(w.result[matrix], rows, sizeof(rows));
      }
    }
  });
  for (uint32_t matrix = 0; matrix < 4; ++matrix) r[matrix] = warp.result[matrix][self.lane];
}

void mma(MmaType type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  MmaOperands& o = warp.mma;
  const uint32_t g = self.lane / 4, t = self.lane % 4;
  o.a[g][t] = a[0];
  o.a[g + 8][t] = a[1];
  o.a[g][t + 4] = a[2];
  o.a[g + 8][t + 4] = a[3];
  o.b[t][g] = b0;
  o.b[t + 4][g] = b1;
  std::memcpy(&o.c[g][2 * t], d, 8);
  std::memcpy(&o.c[g + 8][2 * t], d + 2, 8);
  Block& block = *warp.block;
  block.meet(self, SiteKind::kMma, site, [&](Warp& w, SiteInfo&) { block.mma[static_cast<int>(type)](w.mma); });
  std::memcpy(d, &o.c[g][2 * t], 8);
  std::memcpy(d + 2, &o.c[g + 8][2 * t], 8);
}

void cp_async(uint32_t dst, const void* src, int bytes, Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  const uint32_t offset = block.offset_of(dst, 16, "cp_async", site);
  if (bytes < 0 || bytes > 16) {
    block.fail("cp_async_16 of " + std::to_string(bytes) + " bytes (" + describe(site) + ")");
  }
  check_global_16(src, site);
  const uint32_t id = block.sites.find(site, SiteKind::kCpAsync);
  ++block.sites[id].calls;
  if (block.options.detect_races) {
    const Actor actor = make_actor(self, id);
    block.check(block.shared.begin_copy(offset, {actor, self.warp->step_clock}), "starts a copy to", offset, actor);
  }
  Copy copy{src, offset, static_cast<uint8_t>(bytes), false};
  const CopyTiming timing = block.options.cp_async_timing;
  if (timing == CopyTiming::kAtIssue || (timing == CopyTiming::kRandom && block.random.next() % 4 == 0)) {
    block.land(copy);
  } else {
    std::memset(block.shared.data() + offset, 0xff, 16);  // what is there until then is nobody's to read
  }
  self.copies.push_back(copy);
}

void cp_async_commit(Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  ++block.sites[block.sites.find(site, SiteKind::kCpAsyncCommit)].calls;
  block.land_some(self);
  size_t committed = 0;
  for (const uint32_t count : self.copies_of) committed += count;
  self.copies_of.push_back(static_cast<uint32_t>(self.copies.size() - committed));
}

void cp_async_wait(int pending, Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  SiteInfo& info = block.sites[block.sites.find(site, SiteKind::kCpAsyncWait)];
  if (info.is_skipped) return;
  ++info.calls;
  block.land_some(self);
  block.wait_for_copies(self, static_cast<size_t>(pending));
}

namespace {

template <uint32_t kBytes, bool kIsStore>
[[gnu::always_inline]] inline unsigned char* access(uint32_t at, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  constexpr const char* kVerb = kIsStore ? "writes" : "reads";
  const uint32_t offset = block.offset_of(at, kBytes, kIsStore ? "store" : "load", site);
  const uint32_t id = block.sites.find(site, kIsStore ? SiteKind::kStoreShared : SiteKind::kLoadShared);
  if (block.options.count_bank_conflicts) warp.log.add(self.lane, id, offset, kBytes == 16);
  if (block.options.detect_races) {
    const Actor actor = make_actor(self, id);
    const Accessor who{actor, warp.step_clock};
    if constexpr (kBytes == 16) {
      block.check(kIsStore ? block.shared.write_chunk(offset, who) : block.shared.read_chunk(offset, who), kVerb,
                  offset, actor);
    } else {
      block.check(kIsStore ? block.shared.write_word(offset, who) : block.shared.read_word(offset, who), kVerb, offset,
                  actor);
    }
  }
  return block.shared.data() + offset;
}

}  // namespace

void load_shared_4(uint32_t at, void* x, Site site) { std::memcpy(x, access<4, false>(at, site), 4); }
void load_shared_16(uint32_t at, void* x, Site site) { std::memcpy(x, access<16, false>(at, site), 16); }
void store_shared_4(uint32_t at, const void* x, Site site) { std::memcpy(access<4, true>(at, site), x, 4); }
void store_shared_16(uint32_t at, const void* x, Site site) { std::memcpy(access<16, true>(at, site), x, 16); }

void check_global_16(const void* at, Site site) {
  if (reinterpret_cast<uintptr_t>(at) % 16 == 0) [[likely]]
    return;
  current->warp->block->fail("a global address that is no multiple of 16 (" + describe(site) + ")");
}

// ---- The grid ------------------------------------------------------------------------------------------------------

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
    throw std::runtime_error("fastattn emulator: a block of " + std::to_string(threads) +
                             " threads; it takes whole warps, and at most " + std::to_string(kMaxThreads) +
                             " threads.");
  }
  if (shared_bytes > kMaxSharedBytes) {
    throw std::runtime_error("fastattn emulator: " + std::to_string(shared_bytes) +
                             " bytes of shared memory; there are " + std::to_string(kMaxSharedBytes) + " for a block.");
  }

  // Blocks are handed out in order, so that the first of them that fails is the same for every number of threads.
  std::mutex mutex;
  int64_t next = 0, failed = blocks;
  std::string failure;
  Report total;
  const auto work = [&] {
    std::unique_ptr<Block> block = Pool::instance().take(threads);
    block->start(blocks, shared_bytes, options, body, arg);
    for (;;) {
      int64_t index;
      {
        const std::lock_guard lock(mutex);
        if (next >= blocks || next > failed) break;
        index = next++;
      }
      try {
        block->run(index);
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        if (index < failed) {
          failed = index;
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
