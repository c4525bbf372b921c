// Runs CUDA kernels on the host: one fiber per thread, one block at a time on each thread of the operating system.
//
// A kernel is compiled by the ordinary compiler, and its primitives (cuda/ptx.cuh) come from device.h. run_grid() plays
// the GPU, and not a kind one: threads run in a random order, an asynchronous copy lands when it is least convenient,
// shared memory starts out as NaNs. It stops with a report at a data race, a deadlock, lanes of a warp that part before
// a collective, an access out of bounds or misaligned, and it counts the bank conflicts of every access.
//
// Not modelled: time, registers, global memory between blocks (plain pointers), atomics, named barriers, partial warps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastattn::emulator {

// What a call of a primitive is, and what counts are kept by.
enum class SiteKind : uint8_t {
  kBarrier,      // sync_block
  kWarpBarrier,  // sync_warp
  kShuffle,
  kLdmatrix,
  kMma,
  kCpAsync,
  kCpAsyncCommit,
  kCpAsyncWait,
  kLoadShared,
  kStoreShared,
  kGlobal,
};
const char* site_kind_name(SiteKind kind);

// Where a primitive is called. As a defaulted last argument it names the caller.
struct Site {
  const char* file;
  int line;
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class CopyTiming : uint8_t {
  kAtIssue,  // the source is read, and the data there, at once
  kAtWait,   // as late as the thread's own waits allow
  kRandom,   // either, or in between: drawn for every copy
};

// A fault to plant: calls of this kind at this line do nothing. No line, no fault.
struct SkipSite {
  std::string file;  // the end of its path
  int line = 0;
  SiteKind kind = SiteKind::kBarrier;  // kBarrier, kWarpBarrier or kCpAsyncWait
};

struct Options {
  uint64_t seed = 0;
  bool random_order = true;  // of the warps, and of the lanes between two collectives; otherwise by index
  CopyTiming cp_async_timing = CopyTiming::kRandom;
  SkipSite skip_site;
  bool detect_races = true;
  bool count_bank_conflicts = true;
};

struct SiteCount {
  std::string file;
  int line = 0;
  SiteKind kind = SiteKind::kBarrier;
  uint64_t calls = 0;           // by one thread each
  uint64_t bank_conflicts = 0;  // cycles beyond those that the accesses take at best
};

struct Report {
  uint64_t bank_conflicts_load = 0, bank_conflicts_store = 0;
  std::vector<SiteCount> sites;  // by file, line and kind

  void merge(const Report& other);
};

// Calls body(arg) as every thread of a grid of `blocks` blocks, on `os_threads` threads. What comes of it depends on
// the options, and not on os_threads. Throws std::runtime_error for what a GPU would not forgive.
Report run_grid(int64_t blocks, int threads, size_t shared_bytes, const Options& options, int os_threads,
                void (*body)(const void*), const void* arg);

}  // namespace fastattn::emulator
