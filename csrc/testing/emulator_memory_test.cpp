// The emulator's shared memory: what is in it, who may touch it when, and how long that takes. Kernels with a fault in
// each of these, and the race detector against one that forgets nothing.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "testing/emulator/shared_memory.h"
#include "testing/emulator_kernel.h"

namespace {

using namespace fastattn::cuda;
using namespace fastattn::testing;
using fastattn::emulator::CopyTiming;

// ---- Contents, copies and addresses --------------------------------------------------------------------------------

void check_poison() {
  std::vector<uint32_t> got(2 * 32);
  run(2, 32, {}, [&] {
    const SharedAddress mine = shared_base() + 4u * static_cast<uint32_t>(thread_index());
    got[static_cast<size_t>(block_index()) * 32 + thread_index()] = load_shared_u32(mine);
    store_shared_u32(mine, 7);
  });
  for (const uint32_t bits : got) {
    CHECK(std::isnan(bits_float(bits)) && std::isnan(bf16_to_float(bits & 0xffffu)), "%08x", bits);
    CHECK(std::isnan(f16_to_float(bits & 0xffffu)) && std::isnan(f16_to_float(bits >> 16)), "%08x", bits);
  }
}

void check_copies() {
  alignas(16) uint32_t source[4] = {1, 2, 3, 4};
  for (const int bytes : {0, 4, 8, 16}) {
    U32x4 got{};
    run(1, 32, {}, [&] {
      if (thread_index() == 5) cp_async_16(shared_base() + 64, bytes == 0 ? nullptr : source, bytes);
      cp_async_commit();
      cp_async_wait<0>();
      if (thread_index() == 5) got = load_shared_u32x4(shared_base() + 64);
    });
    for (int n = 0; n < 4; ++n) {
      CHECK(got.x[n] == (4 * n < bytes ? source[n] : 0), "%d bytes, word %d: %u", bytes, n, got.x[n]);
    }
  }

  // A source that changes between the issue and the wait shows when it was read.
  int early = 0, late = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    for (const CopyTiming timing : {CopyTiming::kAtIssue, CopyTiming::kAtWait, CopyTiming::kRandom}) {
      Options options = with_seed(seed);
      options.cp_async_timing = timing;
      alignas(16) uint32_t changing[4] = {1, 1, 1, 1};
      uint32_t first = 0, second = 0;
      run(1, 32, options, [&] {
        if (thread_index() != 0) return;
        cp_async_16(shared_base(), changing, 16);
        cp_async_commit();
        changing[0] = 2;
        cp_async_16(shared_base() + 16, changing, 16);
        cp_async_commit();
        cp_async_wait<1>();
        changing[0] = 3;
        first = load_shared_u32(shared_base());
        cp_async_wait<0>();
        second = load_shared_u32(shared_base() + 16);
      });
      if (timing == CopyTiming::kAtIssue) CHECK(first == 1 && second == 2, "%u %u", first, second);
      if (timing == CopyTiming::kAtWait) CHECK(first == 2 && second == 3, "%u %u", first, second);
      if (timing == CopyTiming::kRandom) ++(second == 2 ? early : late);
    }
  }
  CHECK(early > 5 && late > 5, "%d early, %d late", early, late);
}

void check_addresses() {
  alignas(16) static unsigned char global[64];
  const auto base = [] { return shared_base(); };
  check_fails("beyond", 32, {"out of bounds", "offset 32768 of the block's 32768", name(7)},
              [&] { load_shared_u32(base() + kShared, at(7)); });
  check_fails("before", 32, {"out of bounds", "offset -4 "}, [&] { store_shared_u32(base() - 4, 1, at(7)); });
  check_fails("straddling", 32, {"out of bounds"}, [&] { load_shared_u32x4(base() + kShared, at(7)); });
  check_fails("odd word", 32, {"misaligned", name(7)}, [&] { load_shared_f32(base() + 2, at(7)); });
  check_fails("odd chunk", 32, {"misaligned", name(7)}, [&] { store_shared_f32x4(base() + 8, {}, at(7)); });
  check_fails("odd row", 32, {"ldmatrix", "misaligned", name(7)}, [&] {
    uint32_t r[4];
    ldmatrix_x4(r, base() + 4, at(7));
  });
  check_fails("far row", 32, {"ldmatrix", "out of bounds", name(7)}, [&] {
    uint32_t r[4];
    ldmatrix_x4_trans(r, base() + static_cast<uint32_t>(thread_index()) * 2048, at(7));
  });
  check_fails("copy from an odd address", 32, {"multiple of 16", name(7)},
              [&] { cp_async_16(base() + 16u * static_cast<uint32_t>(thread_index()), global + 4, 16, at(7)); });
  check_fails("copy of too much", 32, {"17 bytes", name(7)}, [&] { cp_async_16(base(), global, 17, at(7)); });
  check_fails("load from an odd address", 32, {"multiple of 16", name(7)},
              [&] { load_global_u32x4(global + 8, at(7)); });
  check_fails("store to an odd address", 32, {"multiple of 16", name(7)},
              [&] { store_global_u32x4(global + 8, {}, at(7)); });
}

// ---- Races ---------------------------------------------------------------------------------------------------------

void check_races() {
  const auto word = [](int n) { return shared_base() + 4u * static_cast<uint32_t>(n); };
  const std::string race = "data race";

  check_fails("store, load", 64, {race, name(1), name(2), "no barrier"}, [&] {
    store_shared_u32(word(thread_index()), 1, at(1));
    load_shared_u32(word(63 - thread_index()), at(2));
  });
  check_passes("store, barrier, load", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(63 - thread_index()));
  });
  check_fails("load, store", 64, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(63 - thread_index()), at(1));
    store_shared_u32(word(thread_index()), 2, at(2));
  });
  check_passes("load, barrier, store", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(63 - thread_index()));
    sync_block();
    store_shared_u32(word(thread_index()), 2);
  });
  check_fails("two stores", 64, {race, name(1)}, [&] { store_shared_u32(word(thread_index() % 63), 1, at(1)); });
  check_passes("many loads", 64, [&] { load_shared_u32(word(thread_index() % 7)); });
  check_passes("a thread with itself", 64, [&] {
    for (uint32_t n = 0; n < 3; ++n) store_shared_u32(word(thread_index()), load_shared_u32(word(thread_index())) + n);
  });
  // Four words of one chunk are four places.
  check_passes("neighbours", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    load_shared_u32(word(thread_index()));
  });
  check_fails("a chunk and one of its words", 64, {race, name(1), name(2)}, [&] {
    if (thread_index() == 40) store_shared_u32x4(word(8), {}, at(1));
    if (thread_index() == 3) load_shared_u32(word(11), at(2));
  });
  check_fails("the words of a chunk, then all of it", 64, {race, name(1), name(2)}, [&] {
    if (thread_index() >= 8 && thread_index() < 12) store_shared_u32(word(thread_index()), 1, at(1));
    sync_warp();
    if (thread_index() == 40) load_shared_u32x4(word(8), at(2));
  });

  // Within a warp sync_warp orders memory; other collectives and other warps' do not.
  check_passes("store, sync_warp, load", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_warp();
    load_shared_u32(word(thread_index() ^ 31));
    sync_warp();
    store_shared_u32(word(thread_index()), 1);
  });
  check_fails("store, shuffle, load", 32, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1, at(1));
    shuffle_xor(1u, 1);
    load_shared_u32(word(thread_index() ^ 31), at(2));
  });
  check_fails("load, shuffle, store", 32, {race, name(1), name(2)}, [&] {
    load_shared_u32(word(thread_index() ^ 31), at(1));
    shuffle_xor(1u, 1);
    store_shared_u32(word(thread_index()), 1, at(2));
  });
  check_fails("sync_warp between warps", 64, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1, at(1));
    sync_warp();
    load_shared_u32(word(thread_index() ^ 63), at(2));
  });
  check_fails("a reader of each warp", 96, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(5), at(1));
    sync_warp();
    sync_warp();
    if (thread_index() == 5) store_shared_u32(word(5), 2, at(2));
  });

  // ldmatrix reads for the whole warp.
  const auto row = [&](int n) { return word(4 * n); };
  check_fails("store, ldmatrix", 32, {race, name(1), name(2)}, [&] {
    uint32_t r[4];
    store_shared_u32x4(row(thread_index()), {}, at(1));
    ldmatrix_x4(r, row(thread_index()), at(2));
  });
  check_fails("ldmatrix, store", 64, {race, name(1), name(2)}, [&] {
    uint32_t r[4];
    store_shared_u32x4(row(thread_index()), {});
    sync_block();
    ldmatrix_x4(r, row(thread_index() % 32), at(1));
    store_shared_u32x4(row(thread_index()), {}, at(2));
  });
  check_passes("store, sync_warp, ldmatrix, sync_warp, store", 64, [&] {
    uint32_t r[4];
    store_shared_u32x4(row(thread_index()), {});
    sync_warp();
    ldmatrix_x4(r, row(thread_index()));
    sync_warp();
    store_shared_u32x4(row(thread_index()), {});
  });
}

// The detector against one that keeps every access and compares with all of them.
class EveryAccess {
 public:
  void sync_block() { ++block_; }
  void sync_warp(uint32_t warp) { ++warp_steps_[warp]; }
  // Of words [begin, end); a whole warp reads as no one thread.
  bool conflicts(uint32_t thread, bool as_warp, bool is_write, uint32_t begin, uint32_t end) {
    const uint32_t warp = thread / 32;
    const Access now{thread, as_warp, is_write, begin, end, block_, warp_steps_[warp], false};
    for (const Access& before : accesses_) {
      const bool overlap = before.begin < end && begin < before.end;
      const bool same_thread = before.thread == thread && !before.as_warp && !as_warp;
      const bool ordered =
          same_thread || before.block < block_ || (before.thread / 32 == warp && before.step < warp_steps_[warp]);
      if (overlap && (before.in_flight || ((before.is_write || is_write) && !ordered))) return true;
    }
    accesses_.push_back(now);
    return false;
  }
  void start_copy() { accesses_.back().in_flight = true; }
  // As a write at the time of the wait.
  void end_copy(uint32_t thread, uint32_t begin) {
    for (Access& access : accesses_) {
      if (!access.in_flight || access.begin != begin) continue;
      access.in_flight = false;
      access.block = block_;
      access.step = warp_steps_[thread / 32];
    }
  }

 private:
  struct Access {
    uint32_t thread;
    bool as_warp, is_write;
    uint32_t begin, end;
    int block, step;
    bool in_flight;
  };
  std::vector<Access> accesses_;
  int block_ = 0;
  int warp_steps_[3] = {};
};

void check_detector() {
  using fastattn::emulator::SharedMemory;
  std::mt19937 random(17);
  const uint32_t threads[] = {0, 1, 5, 32, 33, 64};
  SharedMemory shared;
  shared.resize(48);
  int found = 0;
  for (int round = 0; round < 20000; ++round) {
    shared.start_block();
    EveryAccess every;
    uint32_t clocks[3] = {};
    std::vector<std::pair<uint32_t, uint32_t>> copies;  // thread and place
    // Some rounds with few writes, for histories of many readers; some with few barriers.
    const uint32_t reads = 1 + random() % 8, syncs = 1 + random() % 6;
    for (int step = 0; step < 60; ++step) {
      const uint32_t thread = threads[random() % 6], warp = thread / 32;
      if (random() % (2 * syncs) == 0) {
        if (random() % 3 == 0) {
          every.sync_block();
          shared.tick_barrier();
        } else {
          every.sync_warp(warp);
          clocks[warp] = shared.tick();
        }
        continue;
      }
      if (!copies.empty() && random() % 4 == 0) {
        shared.end_copy(copies.back().second);
        every.end_copy(copies.back().first, copies.back().second / 4);
        copies.pop_back();
        continue;
      }
      const fastattn::emulator::Accessor who{thread, clocks[warp]};
      const uint32_t chunk = static_cast<uint32_t>(random() % 3),
                     word = 4 * chunk + static_cast<uint32_t>(random() % 4);
      const bool is_read = random() % (reads + 1) != 0;
      SharedMemory::Finding finding;
      bool expected;
      const uint32_t kind = static_cast<uint32_t>(random() % 3);
      if (kind == 0) {
        finding = is_read ? shared.read_word(4 * word, who) : shared.write_word(4 * word, who);
        expected = every.conflicts(thread, false, !is_read, word, word + 1);
      } else if (kind == 1 || !is_read) {
        const bool is_copy = !is_read && kind == 2;
        finding = is_read   ? shared.read_chunk(16 * chunk, who)
                  : is_copy ? shared.begin_copy(16 * chunk, who)
                            : shared.write_chunk(16 * chunk, who);
        expected = every.conflicts(thread, false, !is_read, 4 * chunk, 4 * chunk + 4);
        if (is_copy && !expected) {
          every.start_copy();
          copies.emplace_back(thread, 16 * chunk);
        }
      } else {
        finding = shared.read_chunk_as_warp(16 * chunk, who);
        expected = every.conflicts(thread, true, false, 4 * chunk, 4 * chunk + 4);
      }
      const bool conflict = finding.conflict != SharedMemory::Conflict::kNone;
      CHECK(conflict == expected, "round %d, step %d: %d, not %d", round, step, conflict, expected);
      if (conflict || expected) {
        ++found;
        break;
      }
    }
  }
  CHECK(found > 5000 && found < 19900, "%d of 20000 rounds with a race", found);
}

void check_copy_races() {
  alignas(16) static uint32_t source[4] = {1, 2, 3, 4};
  const auto chunk = [](int n) { return shared_base() + 16u * static_cast<uint32_t>(n); };
  for (const CopyTiming timing : {CopyTiming::kAtIssue, CopyTiming::kAtWait, CopyTiming::kRandom}) {
    Options options;
    options.cp_async_timing = timing;
    const auto check = [&](const char* what, std::initializer_list<std::string> parts, const auto& kernel) {
      const std::string text = failure(1, 64, options, kernel);
      for (const std::string& part : parts) CHECK(contains(text, part), "%s: '%s'", what, text.c_str());
      if (parts.size() == 0) CHECK(text.empty(), "%s: '%s'", what, text.c_str());
    };
    check("waited for, and a barrier", {}, [&] {
      cp_async_16(chunk(thread_index()), source, 16);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      load_shared_u32(chunk(63 - thread_index()));
    });
    check("not waited for", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      sync_block();
      load_shared_u32(chunk(63 - thread_index()), at(2));
    });
    check("not committed", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_wait<0>();
      load_shared_u32(chunk(thread_index()), at(2));
    });
    check("one group too many under way", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      cp_async_wait<1>();
      load_shared_u32x4(chunk(thread_index()), at(2));
    });
    check("the older of two groups", {}, [&] {
      cp_async_16(chunk(thread_index()), source, 16);
      cp_async_commit();
      cp_async_16(chunk(64 + thread_index()), source, 16);
      cp_async_commit();
      cp_async_wait<1>();
      load_shared_u32x4(chunk(thread_index()));
    });
    check("no barrier after the wait", {"no barrier", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      cp_async_wait<0>();
      load_shared_u32(chunk(63 - thread_index()), at(2));
    });
    check("a barrier before the wait only", {"data race", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      sync_block();
      cp_async_wait<0>();
      load_shared_u32(chunk(63 - thread_index()), at(2));
    });
    check("into what others still read", {"data race", name(1), name(2)}, [&] {
      store_shared_u32(chunk(thread_index()), 1);
      sync_block();
      load_shared_u32(chunk(63 - thread_index()), at(1));
      cp_async_16(chunk(thread_index()), source, 16, at(2));
    });
    check("a store into it", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      store_shared_u32(chunk(thread_index()), 1, at(2));
    });
    check("a copy left behind", {}, [&] {
      cp_async_16(chunk(thread_index()), source, 16);
      cp_async_commit();
    });
    check("and the next grid's use of its place", {}, [&] { store_shared_u32(chunk(thread_index()), 1); });
  }

  // With no detector to say so, what is under way reads as NaN.
  Options blind;
  blind.detect_races = false;
  blind.cp_async_timing = CopyTiming::kAtWait;
  float got = 0.0f;
  run(1, 32, blind, [&] {
    if (thread_index() != 0) return;
    store_shared_f32(shared_base(), 1.0f);
    cp_async_16(shared_base(), source, 16);
    got = load_shared_f32(shared_base());
  });
  CHECK(std::isnan(got), "%g", double(got));
}

// ---- Bank conflicts ------------------------------------------------------------------------------------------------

uint64_t conflicts(const Report& report, int line, SiteKind kind) {
  const SiteCount* site = find_site(report, line, kind);
  return site ? site->bank_conflicts : ~uint64_t{0};
}

void check_bank_conflicts() {
  const auto base = [] { return shared_base(); };
  const auto thread = [] { return static_cast<uint32_t>(thread_index()); };
  struct {
    uint32_t words;      // between one lane's word and the next one's
    uint64_t conflicts;  // of a warp
  } const strides[] = {{0, 0}, {1, 0}, {2, 1}, {3, 0}, {4, 3}, {5, 0}, {8, 7}, {16, 15}, {32, 31}, {33, 0}};
  for (const auto& stride : strides) {
    const Report report = run(1, 64, {}, [&] {
      load_shared_u32(base() + 4 * (thread() % 32) * stride.words, at(1));
      sync_block();
      if (thread() < 32) store_shared_u32(base() + 4 * thread() * std::max(stride.words, 1u), 1, at(2));
    });
    CHECK(conflicts(report, 1, SiteKind::kLoadShared) == 2 * stride.conflicts, "stride %u: %d", stride.words,
          int(conflicts(report, 1, SiteKind::kLoadShared)));
    CHECK(conflicts(report, 2, SiteKind::kStoreShared) == stride.conflicts, "stride %u: %d", stride.words,
          int(conflicts(report, 2, SiteKind::kStoreShared)));
    CHECK(report.bank_conflicts_load == 2 * stride.conflicts && report.bank_conflicts_store == stride.conflicts,
          "stride %u", stride.words);
    CHECK(find_site(report, 1, SiteKind::kLoadShared)->calls == 64, "calls");
  }
  struct {
    uint32_t chunks;
    uint64_t conflicts;  // of eight lanes
  } const chunk_strides[] = {{0, 0}, {1, 0}, {2, 1}, {3, 0}, {4, 3}, {8, 7}, {9, 0}};
  for (const auto& stride : chunk_strides) {
    const Report report = run(1, 32, {}, [&] {
      uint32_t r[4];
      load_shared_u32x4(base() + 16 * thread() * stride.chunks, at(1));
      ldmatrix_x4(r, base() + 16 * thread() * stride.chunks, at(2));
      ldmatrix_x4_trans(r, base() + 16 * thread() * stride.chunks, at(3));
      sync_block();
      store_shared_u32x4(base() + 16 * thread() * std::max(stride.chunks, 1u), {}, at(4));
    });
    CHECK(conflicts(report, 1, SiteKind::kLoadShared) == 4 * stride.conflicts, "stride %u", stride.chunks);
    CHECK(conflicts(report, 2, SiteKind::kLdmatrix) == 4 * stride.conflicts, "stride %u", stride.chunks);
    CHECK(conflicts(report, 3, SiteKind::kLdmatrix) == 4 * stride.conflicts, "stride %u", stride.chunks);
    CHECK(conflicts(report, 4, SiteKind::kStoreShared) == 4 * stride.conflicts, "stride %u", stride.chunks);
  }
  // Rows of 128 bytes, one row for each lane of a phase: the XOR of chunk and row is what frees them.
  for (const uint32_t mask : {0u, 7u, 3u}) {
    const Report report = run(1, 32, {}, [&] {
      uint32_t r[4];
      const uint32_t row = thread() % 8, chunk = thread() / 8;
      ldmatrix_x4(r, base() + 128 * row + 16 * (chunk ^ (row & mask)), at(1));
    });
    const uint64_t expected = mask == 7 ? 0 : mask == 3 ? 4 : 28;
    CHECK(conflicts(report, 1, SiteKind::kLdmatrix) == expected, "mask %u: %d", mask,
          int(conflicts(report, 1, SiteKind::kLdmatrix)));
  }
  // A loop's accesses are as many as its rounds; a lane that leaves some out does not shift the others'.
  const Report loop = run(1, 32, {}, [&] {
    for (uint32_t n = 0; n < 3; ++n) {
      if (n != 1 || thread() % 2 == 0) load_shared_u32(base() + 4 * (32 * n + thread()), at(1));
      if (thread() < 16) load_shared_u32(base() + 8 * thread(), at(2));
      load_shared_u32(base() + 4 * ((thread() * 16 + n) % 1024), at(3));
    }
  });
  CHECK(conflicts(loop, 2, SiteKind::kLoadShared) == 0 && conflicts(loop, 3, SiteKind::kLoadShared) == 45, "%d %d",
        int(conflicts(loop, 2, SiteKind::kLoadShared)), int(conflicts(loop, 3, SiteKind::kLoadShared)));
  Options off;
  off.count_bank_conflicts = false;
  CHECK(run(1, 32, off, [&] { load_shared_u32(base() + 128 * thread()); }).bank_conflicts_load == 0, "switched off");
}

}  // namespace

int main() {
  check_poison();
  check_copies();
  check_addresses();
  check_races();
  check_detector();
  check_copy_races();
  check_bank_conflicts();
  return fastattn::testing::report("emulator_memory_test");
}
