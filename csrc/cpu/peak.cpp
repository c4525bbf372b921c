// The peak rates that the benchmark compares with.
#include <chrono>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/work.h"

namespace fastattn::cpu {

double measure_peak_flops(DType dtype, const Parallel& parallel) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 200000;
  constexpr int kRepeats = 9;
  const KernelTable& table = kernel_table();
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<double> flop{0.0};
    const Clock::time_point start = Clock::now();
    drain(parallel, parallel.threads, parallel.threads, nullptr, 0, [&](int64_t, char*) {
      float sink;
      const double mine = table.multiply_adds(dtype, kRounds, &sink);
      double before = flop.load();
      while (!flop.compare_exchange_weak(before, before + mine)) {
      }
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (flop.load() / seconds > best) best = flop.load() / seconds;
  }
  return best;
}

double measure_read_bandwidth(const Parallel& parallel) {
  using Clock = std::chrono::steady_clock;
  // More than caches hold, so that a piece is long gone from them when its turn comes again; its words are added up.
  constexpr int64_t kPieces = 512, kPieceWords = (1 << 20) / 8;
  constexpr int kRepeats = 5;
  const Workspace memory(kPieces * kPieceWords * sizeof(uint64_t));
  const uint64_t* words = reinterpret_cast<const uint64_t*>(memory.data());
  std::memset(memory.data(), 1, kPieces * kPieceWords * sizeof(uint64_t));
  std::atomic<uint64_t> total{0};
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const Clock::time_point start = Clock::now();
    drain(parallel, kPieces, parallel.threads, nullptr, 0, [&](int64_t piece, char*) {
      constexpr int64_t kSums = 8;
      uint64_t sum[kSums] = {};
      for (const uint64_t *at = words + piece * kPieceWords, *end = at + kPieceWords; at < end; at += kSums) {
        for (int64_t n = 0; n < kSums; ++n) sum[n] += at[n];
      }
      for (int64_t n = 1; n < kSums; ++n) sum[0] += sum[n];
      total.fetch_add(sum[0], std::memory_order_relaxed);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = static_cast<double>(kPieces * kPieceWords) * sizeof(uint64_t) / seconds;
    if (rate > best) best = rate;
  }
  // Without a look at the sums the compiler may leave out the reads.
  return total.load() != 0 ? best : 0.0;
}

}  // namespace fastattn::cpu
