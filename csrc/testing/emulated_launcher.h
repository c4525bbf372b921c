// Where the engine's kernels run in the emulator: see cuda/engine.cuh for what a launcher is.
#pragma once

#include "cuda/engine.cuh"
#include "cuda/kernel.h"
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
    const int shared_bytes = cuda::launch_shared_bytes<Kernel>(params);
    run.kernels.push_back(Kernel::kName);
    run.report.merge(run_grid(blocks, Kernel::kThreads, shared_bytes, options, os_threads, body, &params));
  }
};

}  // namespace fastattn::emulator
