#include "torch/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

namespace fastattn {
namespace {

void run(const cpu::Parallel&, int workers, void (*body)(void* arg, int worker), void* arg) {
  if (workers <= 1) {  // saves the cost of waking a pool
    if (workers == 1) body(arg, 0);
    return;
  }
  // torch may hand one thread several workers, or all of them: when it is called inside a parallel region already.
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(arg, static_cast<int>(worker));
  });
}

}  // namespace

cpu::Parallel torch_parallel(int max_threads) {
  cpu::Parallel parallel;
  parallel.threads = std::max(1, std::min(static_cast<int>(torch::stable::get_num_threads()), max_threads));
  parallel.run = run;
  return parallel;
}

cpu::Parallel torch_parallel() { return torch_parallel(std::numeric_limits<int>::max()); }

}  // namespace fastattn
