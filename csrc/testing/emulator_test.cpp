// How the emulator runs a grid: the order of its threads, barriers that not all of them reach, and what is said of a
// kernel that fails or lacks a synchronisation.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing/emulator_kernel.h"

namespace {

using namespace fastattn::cuda;
using namespace fastattn::testing;
using fastattn::emulator::run_grid;
using fastattn::emulator::SkipSite;

// ---- Order ---------------------------------------------------------------------------------------------------------

// The order in which the threads of two blocks came by.
std::vector<int> trace(const Options& options, int os_threads) {
  std::vector<std::vector<int>> seen(3);
  run(
      3, 96, options,
      [&] {
        std::vector<int>& mine = seen[static_cast<size_t>(block_index())];
        mine.push_back(thread_index());
        for (int n = 0; n < 4; ++n) {
          sync_warp();
          mine.push_back(thread_index());
        }
        sync_block();
        mine.push_back(thread_index());
      },
      os_threads);
  std::vector<int> all;
  for (const auto& block : seen) all.insert(all.end(), block.begin(), block.end());
  return all;
}

void check_order() {
  const std::vector<int> first = trace(with_seed(1), 1);
  CHECK(first.size() == 3 * 96 * 6, "%d", int(first.size()));
  CHECK(trace(with_seed(1), 1) == first, "the same seed gave another order");
  CHECK(trace(with_seed(1), 3) == first, "three threads of the operating system gave another order");
  CHECK(trace(with_seed(2), 1) != first, "another seed gave the same order");
  CHECK(!std::equal(first.begin(), first.begin() + 96 * 6, first.begin() + 96 * 6), "blocks have the same order");
  Options options;
  options.random_order = false;
  const std::vector<int> in_order = trace(options, 1);
  for (int n = 0; n < 32; ++n) CHECK(in_order[n] == n, "%d came as number %d", in_order[n], n);

  // Blocks start in any order, but for every seed in one.
  const auto block_order = [](const Options& chosen) {
    std::vector<int64_t> order;
    run(20, 32, chosen, [&] {
      if (thread_index() == 0) order.push_back(block_index());
    });
    return order;
  };
  CHECK(block_order(with_seed(1)) == block_order(with_seed(1)), "the same seed gave another order of blocks");
  CHECK(block_order(with_seed(1)) != block_order(with_seed(2)), "another seed gave the same order of blocks");
  const std::vector<int64_t> blocks_in_order = block_order(options);
  for (int n = 0; n < 20; ++n) CHECK(blocks_in_order[n] == n, "block %d is number %d", int(blocks_in_order[n]), n);

  // Every block runs once, and knows its place.
  for (const int64_t blocks : {0, 1, 2, 7, 12}) {
    for (const int os_threads : {1, 4}) {
      std::vector<int> runs(static_cast<size_t>(blocks));
      const Report report = run(
          blocks, 32, with_seed(static_cast<uint64_t>(blocks)),
          [&] {
            if (thread_index() == 0) runs[static_cast<size_t>(block_index())] += grid_blocks() == blocks ? 1 : 100;
            sync_block(at(1));
          },
          os_threads);
      for (const int count : runs) CHECK(count == 1, "%d blocks: one ran %d times", int(blocks), count);
      const SiteCount* site = find_site(report, 1, SiteKind::kBarrier);
      CHECK((site ? site->calls : 0) == 32 * static_cast<uint64_t>(blocks), "%d blocks", int(blocks));
    }
  }
}

// ---- Deadlocks -----------------------------------------------------------------------------------------------------

void check_deadlocks() {
  check_fails("one thread has gone home", 64,
              {"deadlock", name(1), "threads 0-32, 34-63 wait", "threads 33 have exited"}, [] {
                if (thread_index() != 33) sync_block(at(1));
              });
  check_fails("one warp has", 96, {"deadlock", name(1), "threads 0-31, 64-95 wait", "threads 32-63 have exited"}, [] {
    if (thread_index() / 32 != 1) sync_block(at(1));
  });
  check_fails("half of a warp at a shuffle", 32,
              {"deadlock", name(1), "threads 0-15 wait", "threads 16-31 have exited"}, [] {
                if (thread_index() / 16 != 1) shuffle_xor(1u, 1, at(1));
              });
  check_fails("a shuffle and a barrier", 32, {"deadlock", name(1), name(2)}, [] {
    if (thread_index() % 2 == 0) {
      shuffle_xor(1u, 1, at(1));
    } else {
      sync_block(at(2));
    }
  });
  check_fails("two collectives", 32, {"different collectives", name(1), name(2), "sync_warp", "ldmatrix"}, [] {
    uint32_t r[4];
    if (thread_index() < 8) {
      sync_warp(at(1));
    } else {
      ldmatrix_x4(r, shared_base(), at(2));
    }
  });
  check_fails("two places", 32, {"different collectives", name(1), name(2)}, [] {
    if (thread_index() < 8) {
      shuffle_xor(1u, 1, at(1));
    } else {
      shuffle_xor(2u, 1, at(2));
    }
  });
  check_fails("two barriers", 32, {"different collectives", name(1), name(2)}, [] {
    if (thread_index() < 8) {
      sync_block(at(1));
    } else {
      sync_block(at(2));
    }
  });
  check_passes("two barriers, but by warps", 64, [] {
    if (thread_index() < 32) {
      sync_block();
    } else {
      sync_block();
    }
  });
}

// ---- Faults and failures -------------------------------------------------------------------------------------------

// Each of two buffers is filled by copies while the other one is summed; what thread t sums, others have copied.
struct Pipeline {
  static constexpr int kRounds = 5, kThreads = 64;
  const float* source;  // [kRounds][kThreads][4]
  float* sums;          // [kThreads]

  void operator()() const {
    const auto chunk = [](int round, int n) {
      return shared_base() + 16u * static_cast<uint32_t>(round % 2 * kThreads + n);
    };
    const int thread = thread_index();
    const auto load = [&](int round) {
      if (round < kRounds) cp_async_16(chunk(round, thread), source + 4 * (round * kThreads + thread), 16, at(10));
      cp_async_commit(at(11));
    };
    float sum = 0.0f;
    load(0);
    for (int round = 0; round < kRounds; ++round) {
      load(round + 1);
      cp_async_wait<1>(at(12));
      sync_block(at(13));
      const F32x4 x = load_shared_f32x4(chunk(round, (thread + 17 * round + 33) % kThreads), at(14));
      sum += x.x[0] + x.x[3];
      sync_block(at(15));
    }
    sums[thread] = sum;
  }
};

void check_faults() {
  static std::vector<float> storage(4 * Pipeline::kRounds * Pipeline::kThreads + 4);
  void* start = storage.data();
  size_t space = storage.size() * sizeof(float);
  auto* source = static_cast<float*>(std::align(16, space - 16, start, space));
  for (int n = 0; n < 4 * Pipeline::kRounds * Pipeline::kThreads; ++n) source[n] = static_cast<float>(n % 97);
  std::vector<float> sums(Pipeline::kThreads), expected(Pipeline::kThreads);
  const Pipeline pipeline{source, sums.data()};
  for (int thread = 0; thread < Pipeline::kThreads; ++thread) {
    for (int round = 0; round < Pipeline::kRounds; ++round) {
      const float* x = source + 4 * (round * Pipeline::kThreads + (thread + 17 * round + 33) % Pipeline::kThreads);
      expected[thread] += x[0] + x[3];
    }
  }
  Report report;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    sums.assign(sums.size(), 0.0f);
    report.merge(run(1, Pipeline::kThreads, with_seed(seed), pipeline));
    CHECK(sums == expected, "seed %d", int(seed));
  }
  CHECK(report.sites.size() == 6, "%d sites", int(report.sites.size()));
  CHECK(report.bank_conflicts_load == 0 && report.bank_conflicts_store == 0, "conflicts");

  int faults = 0;
  for (const SiteCount& site : report.sites) {
    CHECK(site.file == "test.cu" && site.calls >= 20 * Pipeline::kThreads * Pipeline::kRounds, "%s:%d: %d",
          site.file.c_str(), site.line, int(site.calls));
    if (site.kind != SiteKind::kBarrier && site.kind != SiteKind::kCpAsyncWait) continue;
    ++faults;
    int wrong = 0;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      Options options = with_seed(seed);
      options.skip_site = SkipSite{site.file, site.line, site.kind};
      const std::string text = failure(1, Pipeline::kThreads, options, pipeline);
      CHECK(contains(text, "data race"), "line %d left out: '%s'", site.line, text.c_str());
      // And without the detector, by what comes out.
      options.detect_races = false;
      sums.assign(sums.size(), 0.0f);
      CHECK(failure(1, Pipeline::kThreads, options, pipeline).empty(), "line %d left out", site.line);
      wrong += !(sums == expected);
    }
    CHECK(wrong >= 10, "line %d left out: %d of 20 wrong", site.line, wrong);
  }
  CHECK(faults == 3, "%d", faults);

  Options options;
  options.skip_site = SkipSite{"test.cu", 1, SiteKind::kWarpBarrier};
  const std::string text = failure(1, 32, options, [] {
    store_shared_u32(shared_base() + 4u * static_cast<uint32_t>(thread_index()), 1);
    sync_warp(at(1));
    load_shared_u32(shared_base());
  });
  CHECK(contains(text, "data race"), "'%s'", text.c_str());
}

void check_failures() {
  // Destructors of all threads run, and the next grid finds a working emulator.
  static int alive = 0;
  struct Counted {
    Counted() { ++alive; }
    ~Counted() { --alive; }
  };
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const std::string text = failure(1, 96, with_seed(seed), [] {
      const Counted counted;
      sync_block();
      if (thread_index() == 50) throw std::runtime_error("had enough");
      sync_block();
    });
    CHECK(contains(text, "block 0, thread 50: the kernel threw: had enough"), "'%s'", text.c_str());
    CHECK(alive == 0, "%d frames have not been left", alive);
  }
  const std::string thrown = failure(1, 32, {}, [] { throw 5; });
  CHECK(contains(thrown, "no std::exception"), "'%s'", thrown.c_str());

  // Which block is reported does not depend on who runs it.
  const auto fails_late = [] {
    if (block_index() % 5 == 3) load_shared_u32(shared_base() + kShared, at(1));
  };
  const std::string alone = failure(40, 32, with_seed(4), fails_late);
  for (int n = 0; n < 10; ++n) {
    const std::string together = failure(40, 32, with_seed(4), fails_late, 4);
    CHECK(together == alone && contains(alone, "block "), "'%s' and '%s'", together.c_str(), alone.c_str());
  }

  const auto refuses = [](int threads, size_t shared_bytes) {
    try {
      run_grid(1, threads, shared_bytes, {}, 1, [](const void*) {}, nullptr);
    } catch (const std::runtime_error&) {
      return true;
    }
    return false;
  };
  CHECK(refuses(0, 0) && refuses(33, 0) && refuses(1056, 0) && refuses(32, 228 << 10), "sizes that no GPU has");
  CHECK(!refuses(1024, 227 << 10) && !refuses(32, 0), "sizes that one has");
}

}  // namespace

int main() {
  check_order();
  check_deadlocks();
  check_faults();
  check_failures();
  return fastattn::testing::report("emulator_test");
}
