// The fibers of one block and who runs next.
//
// The lanes of a warp run one after the other up to the next collective; the last to arrive computes it for all lanes
// and goes on. Warps change places at barriers and, in random order, after some of the collectives.
#pragma once

#include <cstdint>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing/emulator/bank_conflicts.h"
#include "testing/emulator/emulator.h"
#include "testing/emulator/fiber.h"
#include "testing/emulator/fragments.h"
#include "testing/emulator/shared_memory.h"
#include "testing/emulator/sites.h"

namespace fastattn::emulator {

constexpr uint32_t kAllLanes = 0xffffffffu;

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
  }

 private:
  uint64_t state_;
};

struct Block;
struct Copies;
struct Warp;

// A cp.async.
struct Copy {
  const void* src;
  uint32_t dst;
  uint8_t bytes;
  bool has_landed;
};

// What switching needs comes first and fits into one line of the cache: 32 of them are in use at once.
struct alignas(64) Thread {
  Context context;
  Warp* warp = nullptr;
  uint8_t lane = 0;
  uint8_t mma_a = 0, mma_b = 0, mma_c = 0;  // the place of its first word in each matrix of MmaOperands
  int index = 0;
  bool is_running_body = false;
  Copies* copies = nullptr;
};

// The asynchronous copies that a thread has not waited for.
struct Copies {
  std::vector<Copy> all;             // in the order of issue
  std::vector<uint32_t> group_ends;  // of the committed groups, in numbers of copies
};

struct Warp {
  // What the lanes bring to a collective, and what it gives them. A lane that is ahead may bring its part of the next
  // one while others have yet to take theirs of this one, so that no lane reads what another one brought.
  MmaOperands mma;
  uint32_t value[32];
  uint32_t lane_mask[32];
  uint32_t result[4][32];

  Block* block = nullptr;
  Thread* lanes = nullptr;
  uint32_t index = 0;
  uint32_t stride = 1;  // the next lane to run is the next runnable one in steps of it: odd, to come by them all
  // Each lane is in one of these.
  uint32_t runnable = 0, arrived = 0, at_barrier = 0, exited = 0;
  SiteKind kind = SiteKind::kBarrier;  // of the collective that lanes have arrived at
  Site site{"", 0};
  Site barrier_site{"", 0};
  uint32_t step_clock = 0;  // the clock at the warp's last sync_warp
  AccessLog log;
};

class Stacks;

struct Block {
  explicit Block(int thread_count);
  ~Block();

  void start(int64_t blocks, size_t shared_bytes, const Options& chosen, void (*kernel)(const void*),
             const void* kernel_arg);
  void run(int64_t index);  // throws a report
  Report report() const;

  // What a thread does. Everything that fails throws, and unwinds the thread's own fiber.
  template <class Complete>
  void meet(Thread& self, SiteKind kind, Site site, Complete complete);
  void wait_at_barrier(Thread& self, Site site);
  void land(Copy& copy);
  void land_some(Copies& mine);
  void wait_for_copies(Copies& mine, size_t pending);

  template <class... Parts>
  [[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... what) const;
  [[noreturn, gnu::cold]] void fail_address(const char* what, uint32_t at, uint32_t bytes, Site site) const;
  [[noreturn, gnu::cold]] void fail_race(SharedMemory::Finding finding, const char* verb, uint32_t offset,
                                         Actor actor) const;
  [[noreturn, gnu::cold]] void fail_parted(const Warp& warp, SiteKind kind, Site site) const;
  [[noreturn, gnu::cold]] void fail_deadlock() const;

  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::vector<Copies> copies;  // of each thread
  SharedMemory shared;
  SiteTable sites;
  MmaFunction mma[3];
  Random random{0};

  Options options;
  int64_t grid_blocks = 0, block_index = 0;

 private:
  friend void start_fiber();

  void run_fiber(Thread& self);
  Context& leave(Thread& self);
  void go_to(Thread& self, Thread& next);
  Thread& pick_lane(Warp& warp, uint32_t start);
  Thread& pick_warp();
  uint32_t all_warps() const { return warps.size() == 32 ? kAllLanes : (1u << warps.size()) - 1; }
  Thread* pick_after_collective(Thread& self);
  template <class Complete>
  Thread* finish(Thread& self, SiteKind kind, Site site, Complete complete);

  std::string describe(Actor actor) const;
  std::string describe_exception(const Thread& self, const char* what) const;
  std::string describe_deadlock() const;

  std::unique_ptr<Stacks> stacks_;
  Context scheduler_;
  void (*body_)(const void*) = nullptr;
  const void* arg_ = nullptr;
  uint32_t runnable_warps_ = 0;
  int at_barrier_ = 0, exited_ = 0;
  bool is_cancelled_ = false;
  std::string failure_;
};

// A report, on its way out of the fiber that it is about.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Unwinds the fibers of a block that has failed elsewhere.
struct Cancelled {};

// The thread whose fiber runs.
[[gnu::tls_model("initial-exec")]] extern constinit thread_local Thread* current;

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
std::string short_path(const std::string& path);
std::string describe(Site site);

// Names the block and the thread.
template <class... Parts>
void Block::fail(const Parts&... what) const {
  throw Failure(join("fastattn emulator: block ", block_index, ", thread ", current->index, ": ", what..., "."));
}

// ---- The way that every collective takes ---------------------------------------------------------------------------

// The next lane that can run, after `start` in the warp's order. There is one.
[[gnu::always_inline]] inline Thread& Block::pick_lane(Warp& warp, uint32_t start) {
  uint32_t lane = start;
  do {
    lane = (lane + warp.stride) % 32;
  } while (!(warp.runnable >> lane & 1));
  return warp.lanes[lane];
}

[[gnu::always_inline]] inline void Block::go_to(Thread& self, Thread& next) {
  current = &next;
  switch_context(self.context, next.context);
  if (is_cancelled_) [[unlikely]]
    throw Cancelled{};
}

// Returns who goes on, or null for the thread itself.
template <class Complete>
[[gnu::noinline]] Thread* Block::finish(Thread& self, SiteKind kind, Site site, Complete complete) {
  Warp& warp = *self.warp;
  if (warp.arrived != kAllLanes) fail_deadlock();
  if (!warp.log.is_empty()) warp.log.flush(sites);
  const uint32_t id = sites.find(site, kind);
  sites[id].calls += 32;
  complete(warp, id);
  warp.arrived = 0;
  warp.runnable = kAllLanes;
  return pick_after_collective(self);
}

// The lane waits until all lanes of its warp are here; the last one runs complete(warp, site's number).
template <class Complete>
[[gnu::always_inline]] inline void Block::meet(Thread& self, SiteKind kind, Site site, Complete complete) {
  Warp& warp = *self.warp;
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = site;
  } else if (warp.site.line != site.line || warp.kind != kind || warp.site.file != site.file) [[unlikely]] {
    fail_parted(warp, kind, site);
  }
  const uint32_t bit = 1u << self.lane;
  warp.arrived |= bit;
  warp.runnable &= ~bit;
  Thread* next;
  if (warp.runnable != 0) [[likely]] {
    next = &pick_lane(warp, self.lane);
  } else {
    next = finish(self, kind, site, complete);
    if (next == nullptr) return;
  }
  go_to(self, *next);
}

}  // namespace fastattn::emulator
