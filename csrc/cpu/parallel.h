// How the kernels ask for threads, without knowing whose threads they are.
#pragma once

#include <cstdint>

namespace fastattn::cpu {

struct Parallel {
  int threads = 1;
  // Calls body(arg, worker) once for every worker in [0, workers), workers <= threads, possibly at the same time,
  // and returns when all are done. body does not throw.
  void (*run)(const Parallel& self, int workers, void (*body)(void* arg, int worker), void* arg) = nullptr;
  void* context = nullptr;
};

// Runs every worker on the calling thread.
inline Parallel serial() {
  Parallel parallel;
  parallel.run = [](const Parallel&, int workers, void (*body)(void*, int), void* arg) {
    for (int worker = 0; worker < workers; ++worker) body(arg, worker);
  };
  return parallel;
}

}  // namespace fastattn::cpu
