// Threads for the tests and the test module: every parallel region starts its own. Slow, but nothing is shared between
// regions, and ThreadSanitizer sees everything.
#pragma once

#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace fastattn::testing {

inline cpu::Parallel threads(int count) {
  cpu::Parallel parallel;
  parallel.threads = count;
  parallel.run = [](const cpu::Parallel&, int workers, void (*body)(void*, int), void* arg) {
    std::vector<std::thread> others;
    for (int worker = 1; worker < workers; ++worker) others.emplace_back(body, arg, worker);
    if (workers > 0) body(arg, 0);
    for (std::thread& other : others) other.join();
  };
  return parallel;
}

}  // namespace fastattn::testing
