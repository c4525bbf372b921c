// Runs small kernels on the emulator, for its tests: what they report, and what went wrong in them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/ptx.cuh"
#include "testing/check.h"
#include "testing/emulator/emulator.h"

namespace fastattn::testing {

using emulator::Options;
using emulator::Report;
using emulator::Site;
using emulator::SiteCount;
using emulator::SiteKind;

constexpr size_t kShared = 32 << 10;

// Where a call of a primitive is to say that it stands.
constexpr Site at(int line) { return {"test.cu", line}; }
inline std::string name(int line) { return "test.cu:" + std::to_string(line) + ")"; }

template <class Kernel>
Report run(int64_t blocks, int threads, const Options& options, const Kernel& kernel, int os_threads = 1) {
  return emulator::run_grid(
      blocks, threads, kShared, options, os_threads, [](const void* arg) { (*static_cast<const Kernel*>(arg))(); },
      &kernel);
}

// What went wrong, or nothing.
template <class Kernel>
std::string failure(int64_t blocks, int threads, const Options& options, const Kernel& kernel, int os_threads = 1) {
  try {
    run(blocks, threads, options, kernel, os_threads);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

inline Options with_seed(uint64_t seed) {
  Options options;
  options.seed = seed;
  return options;
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// The kernel fails, whatever the order of its threads, and the report has all the parts.
template <class Kernel>
void check_fails(const char* what, int threads, std::initializer_list<std::string> parts, const Kernel& kernel) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    Options options = with_seed(seed);
    options.random_order = seed != 0;
    const std::string text = failure(1, threads, options, kernel);
    for (const std::string& part : parts) {
      CHECK(contains(text, part), "%s, seed %d: no '%s' in '%s'", what, int(seed), part.c_str(), text.c_str());
    }
  }
}

template <class Kernel>
void check_passes(const char* what, int threads, const Kernel& kernel) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    Options options = with_seed(seed);
    options.random_order = seed != 0;
    const std::string text = failure(2, threads, options, kernel);
    CHECK(text.empty(), "%s, seed %d: '%s'", what, int(seed), text.c_str());
  }
}

inline const SiteCount* find_site(const Report& report, int line, SiteKind kind) {
  for (const SiteCount& site : report.sites) {
    if (site.line == line && site.kind == kind) return &site;
  }
  return nullptr;
}

}  // namespace fastattn::testing
