#include "testing/emulator/scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>

namespace fastattn::emulator {

constinit thread_local Thread* current = nullptr;

#if defined(FASTATTN_FIBER_ASAN)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// One for each thread, with a page below it that nothing may touch. Memory is taken as it is used.
class Stacks {
 public:
  explicit Stacks(size_t count) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), count_(count) {
    void* base = mmap(nullptr, count_ * stride(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(base);
    for (size_t n = 0; n < count_; ++n) {
      if (mprotect(base_ + n * stride(), page_, PROT_NONE) != 0) throw std::bad_alloc();
    }
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { munmap(base_, count_ * stride()); }

  unsigned char* bottom(size_t n) { return base_ + n * stride() + page_; }

 private:
  size_t stride() const { return page_ + kStackBytes; }

  size_t page_, count_;
  unsigned char* base_ = nullptr;
};

// ---- A fiber -------------------------------------------------------------------------------------------------------

namespace {

// For a fiber between two blocks, which another thread of the operating system may take up: the compiler must not keep
// the address of `current` beyond a switch there.
[[gnu::noinline]] void set_current(Thread& thread) { current = &thread; }

}  // namespace

void start_fiber() {
  Thread& self = *current;
  arrive_from_switch(self.context);
  self.warp->block->run_fiber(self);
}

// A fiber lives as long as its Block: it runs the body once for every block of a grid, whichever grid that is. In
// between, nothing on its stack may need a destructor, for it may never be resumed.
void Block::run_fiber(Thread& self) {
  for (;;) {
    self.is_running_body = true;
    // No exception may cross a switch: it ends here, and what it says goes on as text. The first one counts.
    try {
      body_(arg_);
    } catch (const Cancelled&) {
    } catch (const Failure& report) {
      if (!is_cancelled_) failure_ = report.what();
    } catch (const std::exception& thrown) {
      if (!is_cancelled_) failure_ = describe_exception(self, thrown.what());
    } catch (...) {
      if (!is_cancelled_) failure_ = describe_exception(self, "what is no std::exception");
    }
    self.is_running_body = false;
    Context& next = failure_.empty() ? leave(self) : scheduler_;
    switch_context(self.context, next);
  }
}

// A thread has come to the end of the kernel; who goes on?
Context& Block::leave(Thread& self) {
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  warp.runnable &= ~bit;
  warp.exited |= bit;
  ++exited_;
  if (warp.runnable != 0) {
    Thread& next = pick_lane(warp, self.lane);
    set_current(next);
    return next.context;
  }
  runnable_warps_ &= ~(1u << warp.index);
  if (warp.arrived != 0 || (runnable_warps_ == 0 && exited_ != static_cast<int>(threads.size()))) {
    failure_ = describe_deadlock();
    return scheduler_;
  }
  if (runnable_warps_ == 0) return scheduler_;
  Thread& next = pick_warp();
  set_current(next);
  return next.context;
}

// ---- A block -------------------------------------------------------------------------------------------------------

Block::Block(int thread_count)
    : warps(static_cast<size_t>(thread_count / 32)),
      threads(static_cast<size_t>(thread_count)),
      copies(threads.size()),
      stacks_(std::make_unique<Stacks>(threads.size())) {
  for (size_t n = 0; n < threads.size(); ++n) {
    Thread& thread = threads[n];
    thread.warp = &warps[n / 32];
    thread.index = static_cast<int>(n);
    thread.copies = &copies[n];
    thread.lane = static_cast<uint8_t>(n % 32);
    const int group = thread.lane / 4, in_group = thread.lane % 4;
    thread.mma_a = static_cast<uint8_t>(8 * group + in_group);
    thread.mma_b = static_cast<uint8_t>(8 * in_group + group);
    thread.mma_c = static_cast<uint8_t>(8 * group + 2 * in_group);
    // Were all tops at the same place within a page, they would compete for the same few lines of the cache.
    const size_t shift = n % 32 * 128;
    prepare_context(thread.context, stacks_->bottom(n), kStackBytes - shift, start_fiber);
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

Block::~Block() = default;

void Block::start(int64_t blocks, size_t shared_bytes, const Options& chosen, void (*kernel)(const void*),
                  const void* kernel_arg) {
  grid_blocks = blocks;
  options = chosen;
  body_ = kernel;
  arg_ = kernel_arg;
  sites.start(options.skip_site);
  shared.resize(shared_bytes);
}

void Block::run(int64_t index) {
  block_index = index;
  random = Random(options.seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(index));
  shared.start_block();
  for (Thread& thread : threads) {
    thread.is_running_body = false;
    thread.copies->all.clear();
    thread.copies->group_ends.clear();
  }
  for (Warp& warp : warps) {
    warp.runnable = kAllLanes;
    warp.arrived = warp.at_barrier = warp.exited = 0;
    warp.stride = 1;
    warp.step_clock = 0;
    warp.log.clear();
  }
  runnable_warps_ = all_warps();
  at_barrier_ = exited_ = 0;
  is_cancelled_ = false;
  failure_.clear();

  Thread& first = pick_warp();
  current = &first;
  switch_context(scheduler_, first.context);

  if (!failure_.empty()) {
    is_cancelled_ = true;
    for (Thread& thread : threads) {
      if (!thread.is_running_body) continue;
      current = &thread;
      switch_context(scheduler_, thread.context);
    }
  }
  current = nullptr;
  if (!failure_.empty()) throw std::runtime_error(failure_);
  for (Warp& warp : warps) warp.log.flush(sites);
}

Thread& Block::pick_warp() {
  if (!options.random_order) return pick_lane(warps[static_cast<size_t>(std::countr_zero(runnable_warps_))], 31);
  const uint64_t drawn = random.next();
  int skip = static_cast<int>((drawn >> 32) % static_cast<uint64_t>(std::popcount(runnable_warps_)));
  uint32_t left = runnable_warps_;
  while (skip-- > 0) left &= left - 1;
  Warp& warp = warps[static_cast<size_t>(std::countr_zero(left))];
  warp.stride = (drawn & 31) | 1;
  return pick_lane(warp, drawn >> 5 & 31);
}

Thread* Block::pick_after_collective(Thread& self) {
  Warp& warp = *self.warp;
  Thread* next = &self;
  if (!options.random_order) {
    next = warp.lanes;
  } else {
    const uint64_t drawn = random.next();
    warp.stride = (drawn & 31) | 1;
    // Now and then the warp stops between two lanes' ways, or another one goes on.
    if ((drawn >> 5 & 7) == 0) next = &pick_warp();
  }
  return next == &self ? nullptr : next;
}

void Block::wait_at_barrier(Thread& self, Site site) {
  Warp& warp = *self.warp;
  if (warp.at_barrier == 0) {
    warp.barrier_site = site;
  } else if (warp.barrier_site.line != site.line || warp.barrier_site.file != site.file) [[unlikely]] {
    fail_parted(warp, SiteKind::kBarrier, site);
  }
  const uint32_t bit = 1u << self.lane;
  warp.runnable &= ~bit;
  warp.at_barrier |= bit;
  ++at_barrier_;
  Thread* next;
  if (at_barrier_ == static_cast<int>(threads.size())) {
    at_barrier_ = 0;
    shared.tick_barrier();
    for (Warp& each : warps) {
      each.runnable = kAllLanes;
      each.at_barrier = 0;
      if (!each.log.is_empty()) each.log.flush(sites);
    }
    runnable_warps_ = all_warps();
    next = &pick_warp();
    if (next == &self) return;
  } else if (warp.runnable != 0) {
    next = &pick_lane(warp, self.lane);
  } else {
    runnable_warps_ &= ~(1u << warp.index);
    if (warp.arrived != 0 || runnable_warps_ == 0) fail_deadlock();
    next = &pick_warp();
  }
  go_to(self, *next);
}

// ---- Asynchronous copies -------------------------------------------------------------------------------------------

void Block::land(Copy& copy) {
  unsigned char* dst = shared.data() + copy.dst;
  if (copy.bytes > 0) std::memcpy(dst, copy.src, copy.bytes);
  std::memset(dst + copy.bytes, 0, size_t{16} - copy.bytes);
  copy.has_landed = true;
}

// Where copies may land before their wait, some do.
void Block::land_some(Copies& mine) {
  if (options.cp_async_timing != CopyTiming::kRandom) return;
  const uint64_t drawn = random.next();
  if (drawn >> 63) return;
  int n = 0;
  for (Copy& copy : mine.all) {
    if (!copy.has_landed && (drawn >> n++ % 63 & 1)) land(copy);
  }
}

void Block::wait_for_copies(Copies& mine, size_t pending) {
  if (mine.group_ends.size() <= pending) return;
  const size_t groups = mine.group_ends.size() - pending;
  const uint32_t done = mine.group_ends[groups - 1];
  for (uint32_t n = 0; n < done; ++n) {
    Copy& copy = mine.all[n];
    if (!copy.has_landed) land(copy);
    if (options.detect_races) shared.end_copy(copy.dst);
  }
  mine.all.erase(mine.all.begin(), mine.all.begin() + static_cast<ptrdiff_t>(done));
  mine.group_ends.erase(mine.group_ends.begin(), mine.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (uint32_t& end : mine.group_ends) end -= done;
}

// ---- Reports -------------------------------------------------------------------------------------------------------

std::string short_path(const std::string& path) {
  const size_t at = path.rfind("csrc/");
  return at == std::string::npos ? path : path.substr(at);
}

std::string describe(Site site) { return join(short_path(site.file), ":", site.line); }

std::string Block::describe(Actor actor) const {
  const SiteInfo& info = sites[actor_site(actor)];
  return join("thread ", actor_thread(actor), " (", site_kind_name(info.kind), " at ", emulator::describe(info.site),
              ")");
}

namespace {

// "threads 0-3, 7"
std::string describe_threads(const std::vector<uint32_t>& lanes_of_warp) {
  const auto has = [&](size_t thread) {
    return thread / 32 < lanes_of_warp.size() && (lanes_of_warp[thread / 32] >> thread % 32 & 1);
  };
  std::ostringstream text;
  const char* before = "threads ";
  for (size_t first = 0; first < 32 * lanes_of_warp.size(); ++first) {
    if (!has(first)) continue;
    size_t last = first;
    while (has(last + 1)) ++last;
    text << before << first;
    if (last > first) text << "-" << last;
    before = ", ";
    first = last;
  }
  return text.str();
}

std::string describe_lanes(const Warp& warp, uint32_t lanes) {
  std::vector<uint32_t> lanes_of_warp(warp.index + 1);
  lanes_of_warp[warp.index] = lanes;
  return describe_threads(lanes_of_warp);
}

std::string describe_call(SiteKind kind, Site site) {
  return join(site_kind_name(kind), " (", emulator::describe(site), ")");
}

}  // namespace

std::string Block::describe_exception(const Thread& self, const char* what) const {
  return join("fastattn emulator: block ", block_index, ", thread ", self.index, ": the kernel threw: ", what);
}

std::string Block::describe_deadlock() const {
  std::map<std::string, std::vector<uint32_t>> threads_by_state;
  for (const Warp& warp : warps) {
    const auto add = [&](uint32_t lanes, const std::string& state) {
      if (lanes == 0) return;
      auto& lanes_of_warp = threads_by_state[state];
      lanes_of_warp.resize(warps.size());
      lanes_of_warp[warp.index] = lanes;
    };
    add(warp.arrived, join("wait for their warp at ", describe_call(warp.kind, warp.site)));
    add(warp.at_barrier, join("wait at ", describe_call(SiteKind::kBarrier, warp.barrier_site)));
    add(warp.exited, "have exited");
    add(warp.runnable, "could run");
  }
  std::ostringstream text;
  text << "fastattn emulator: block " << block_index << ": deadlock";
  const char* before = ": ";
  for (const auto& [state, lanes_of_warp] : threads_by_state) {
    text << before << describe_threads(lanes_of_warp) << " " << state;
    before = "; ";
  }
  text << ".";
  return text.str();
}

void Block::fail_address(const char* what, uint32_t at, uint32_t bytes, Site site) const {
  fail(what, " of ", bytes, " bytes at offset ", static_cast<int64_t>(at) - kSharedBase, " of the block's ",
       shared.bytes(), " bytes of shared memory: ", at % bytes != 0 ? "misaligned" : "out of bounds", " (",
       emulator::describe(site), ")");
}

void Block::fail_race(SharedMemory::Finding finding, const char* verb, uint32_t offset, Actor actor) const {
  const char* done = "is still copying to: it has not waited for that copy";
  if (finding.conflict == SharedMemory::Conflict::kWrite) done = "wrote, and no barrier orders the two";
  if (finding.conflict == SharedMemory::Conflict::kRead) done = "read, and no barrier orders the two";
  fail("data race: ", describe(actor), " ", verb, " shared memory at offset ", offset, ", which ",
       describe(finding.other), " ", done);
}

void Block::fail_parted(const Warp& warp, SiteKind kind, Site site) const {
  const bool is_barrier = kind == SiteKind::kBarrier;
  fail("the lanes of a warp are at different collectives: ",
       describe_lanes(warp, is_barrier ? warp.at_barrier : warp.arrived), " at ",
       describe_call(is_barrier ? kind : warp.kind, is_barrier ? warp.barrier_site : warp.site), ", this one at ",
       describe_call(kind, site));
}

void Block::fail_deadlock() const { throw Failure(describe_deadlock()); }

Report Block::report() const {
  Report report;
  for (const SiteInfo& info : sites.all()) {
    report.sites.push_back({short_path(info.site.file), info.site.line, info.kind, info.calls, info.bank_conflicts});
    (info.kind == SiteKind::kStoreShared ? report.bank_conflicts_store : report.bank_conflicts_load) +=
        info.bank_conflicts;
  }
  return report;
}

}  // namespace fastattn::emulator
