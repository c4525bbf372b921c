// Where the engine's kernels run in the emulator: see cuda/engine.cuh for what a launcher is.
#pragma once

#include "cuda/engine.cuh"
#include "testing/emulated_engine.h"

namespace fastattn::emulator {

struct EmulatedLauncher {
  Options options;
  int os_threads = 1;
  Run run;

  template <class Kernel>
  void launch(int64_t blocks, const typename Kernel::Params& params) {
    if (blocks == 0) return;
    const auto body = [](const void* arg) { Kernel::run(*static_cast<const typename Kernel::Params*>(arg)); };
    int shared_bytes = Kernel::kSharedBytes;
    if constexpr (requires { Kernel::shared_bytes(params); }) shared_bytes = Kernel::shared_bytes(params);
    run.kernels.push_back(Kernel::kName);
    run.report.merge(run_grid(blocks, Kernel::kThreads, shared_bytes, options, os_threads, body, &params));
  }
};

}  // namespace fastattn::emulator
