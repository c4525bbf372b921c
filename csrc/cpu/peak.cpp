// What the benchmark compares with: peak rates.
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

uint64_t sum_words(const Words (&buffers)[2], const Parallel& parallel) {
  constexpr int64_t kPieceWords = (128 << 10) / 8, kSums = 8;
  const int64_t first_pieces = ceil_div(buffers[0].count, kPieceWords);
  const int64_t pieces = first_pieces + ceil_div(buffers[1].count, kPieceWords);
  std::atomic<uint64_t> total{0};
  drain(parallel, pieces, static_cast<int>(clamp_i64(pieces, 1, parallel.threads)), nullptr, 0,
        [&](int64_t piece, char*) {
          const Words& buffer = buffers[piece < first_pieces ? 0 : 1];
          const int64_t begin = (piece < first_pieces ? piece : piece - first_pieces) * kPieceWords;
          const int64_t end = min_i64(buffer.count, begin + kPieceWords);
          uint64_t sum[kSums] = {};
          int64_t at = begin;
          for (; at + kSums <= end; at += kSums) {
            for (int64_t n = 0; n < kSums; ++n) sum[n] += buffer.data[at + n];
          }
          for (; at < end; ++at) sum[0] += buffer.data[at];
          for (int64_t n = 1; n < kSums; ++n) sum[0] += sum[n];
          total.fetch_add(sum[0], std::memory_order_relaxed);
        });
  return total.load();
}

}  // namespace fastattn::cpu
