// The peak rates that the benchmark compares with.
#include <chrono>

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

}  // namespace fastattn::cpu
