// The emulator against what PTX says of the instructions, and against kernels with a fault in each of them.
#include "testing/emulator/emulator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/ptx.cuh"
#include "testing/check.h"
#include "testing/emulator/shared_memory.h"
#include "testing/half.h"

namespace {

using namespace fastattn::cuda;
using fastattn::emulator::CopyTiming;
using fastattn::emulator::Options;
using fastattn::emulator::Report;
using fastattn::emulator::run_grid;
using fastattn::emulator::Site;
using fastattn::emulator::SiteCount;
using fastattn::emulator::SiteKind;
using fastattn::emulator::SkipSite;

constexpr size_t kShared = 32 << 10;

// Where a call of a primitive is to say that it stands.
constexpr Site at(int line) { return {"test.cu", line}; }
std::string name(int line) { return "test.cu:" + std::to_string(line) + ")"; }

template <class Kernel>
Report run(int64_t blocks, int threads, const Options& options, const Kernel& kernel, int os_threads = 1) {
  return run_grid(
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

Options with_seed(uint64_t seed) {
  Options options;
  options.seed = seed;
  return options;
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

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

const SiteCount* find_site(const Report& report, int line, SiteKind kind) {
  for (const SiteCount& site : report.sites) {
    if (site.line == line && site.kind == kind) return &site;
  }
  return nullptr;
}

// ---- What the instructions compute ---------------------------------------------------------------------------------

// Matrices A [16, K], B [K, 8] and C [16, 8] of one warp, as PTX spreads them over its registers.
template <class Element, int K, class Mma>
void check_mma(const char* what, Mma mma, bool has_specials) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 4; ++round) {
    std::vector<Element> a(16 * K), b(K * 8);
    std::vector<float> c(16 * 8), got(16 * 8);
    const auto fill = [&](std::vector<Element>& elements) {
      for (Element& x : elements) {
        if constexpr (sizeof(Element) == 4) {
          x = bits_float(float_bits(normal(random)) & ~0x1fffu);
        } else {
          fastattn::testing::from_float(normal(random) * (round == 1 ? 1e-5f : 1.0f), &x);  // subnormal as float16
        }
      }
    };
    fill(a);
    fill(b);
    for (float& x : c) x = normal(random);
    if (has_specials && round == 2) {
      if constexpr (sizeof(Element) == 2) {
        fastattn::testing::from_float(std::numeric_limits<float>::infinity(), &a[3 * K + 5]);
        fastattn::testing::from_float(std::numeric_limits<float>::quiet_NaN(), &b[5 * 8 + 2]);
      }
    }
    const auto word = [](const Element& lo, const Element& hi) -> uint32_t {
      if constexpr (sizeof(Element) == 4) {
        return float_bits(lo) | 0x1234u % 0x2000u;  // what the hardware ignores
      } else {
        return lo.bits | static_cast<uint32_t>(hi.bits) << 16;
      }
    };
    run(1, 32, with_seed(static_cast<uint64_t>(round)), [&] {
      const int g = thread_index() / 4, t = thread_index() % 4;
      uint32_t ra[4], rb[2];
      if constexpr (K == 16) {
        const auto pair_a = [&](int i, int k) { return word(a[i * K + k], a[i * K + k + 1]); };
        const auto pair_b = [&](int k, int n) { return word(b[k * 8 + n], b[(k + 1) * 8 + n]); };
        ra[0] = pair_a(g, 2 * t);
        ra[1] = pair_a(g + 8, 2 * t);
        ra[2] = pair_a(g, 2 * t + 8);
        ra[3] = pair_a(g + 8, 2 * t + 8);
        rb[0] = pair_b(2 * t, g);
        rb[1] = pair_b(2 * t + 8, g);
      } else {
        const auto one_a = [&](int i, int k) { return word(a[i * K + k], a[i * K + k]); };
        const auto one_b = [&](int k, int n) { return word(b[k * 8 + n], b[k * 8 + n]); };
        ra[0] = one_a(g, t);
        ra[1] = one_a(g + 8, t);
        ra[2] = one_a(g, t + 4);
        ra[3] = one_a(g + 8, t + 4);
        rb[0] = one_b(t, g);
        rb[1] = one_b(t + 4, g);
      }
      float rc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
      mma(rc, ra, rb[0], rb[1]);
      got[g * 8 + 2 * t] = rc[0];
      got[g * 8 + 2 * t + 1] = rc[1];
      got[(g + 8) * 8 + 2 * t] = rc[2];
      got[(g + 8) * 8 + 2 * t + 1] = rc[3];
    });
    for (int i = 0; i < 16; ++i) {
      for (int n = 0; n < 8; ++n) {
        double expected = c[i * 8 + n], magnitude = std::abs(expected);
        for (int k = 0; k < K; ++k) {
          const double product =
              double(fastattn::testing::to_float(a[i * K + k])) * double(fastattn::testing::to_float(b[k * 8 + n]));
          expected += product;
          magnitude += std::abs(product);
        }
        const double difference = std::abs(double(got[i * 8 + n]) - expected);
        const bool is_same = std::isfinite(expected) ? difference <= 0x1p-22 * magnitude
                                                     : std::isnan(expected) == std::isnan(got[i * 8 + n]) &&
                                                           (std::isnan(expected) || got[i * 8 + n] == expected);
        CHECK(is_same, "%s round %d (%d, %d): %g, not %g", what, round, i, n, double(got[i * 8 + n]), expected);
      }
    }
  }
}

void check_ldmatrix() {
  for (const bool is_transposed : {false, true}) {
    std::vector<uint32_t> got(32 * 4);
    // Row r of matrix m lies at chunk (5 r + 9 m) mod 41, and element j of it is 1000 m + 10 r + j.
    const auto chunk = [](int m, int r) { return static_cast<uint32_t>((5 * r + 9 * m) % 41); };
    run(1, 32, with_seed(3), [&] {
      const int lane = thread_index(), m = lane / 8, r = lane % 8;
      U32x4 row;
      for (int j = 0; j < 8; j += 2) {
        row.x[j / 2] = static_cast<uint32_t>(1000 * m + 10 * r + j) | static_cast<uint32_t>(1000 * m + 10 * r + j + 1)
                                                                          << 16;
      }
      store_shared_u32x4(shared_base() + 16 * chunk(m, r), row);
      sync_warp();
      uint32_t x[4];
      if (is_transposed) {
        ldmatrix_x4_trans(x, shared_base() + 16 * chunk(m, r));
      } else {
        ldmatrix_x4(x, shared_base() + 16 * chunk(m, r));
      }
      std::copy(x, x + 4, &got[4 * static_cast<size_t>(lane)]);
    });
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        for (int half = 0; half < 2; ++half) {
          const int i = lane / 4, j = 2 * (lane % 4) + half;
          const int expected = 1000 * m + (is_transposed ? 10 * j + i : 10 * i + j);
          const int found = static_cast<int>(got[4 * lane + m] >> 16 * half & 0xffffu);
          CHECK(found == expected, "trans %d, lane %d, matrix %d: %d, not %d", is_transposed, lane, m, found, expected);
        }
      }
    }
  }
}

void check_shuffles() {
  for (const int mask : {0, 1, 2, 4, 8, 16, 31}) {
    std::vector<float> got(64), chained(64);
    run(1, 64, with_seed(9), [&] {
      const int thread = thread_index();
      got[thread] = shuffle_xor(static_cast<float>(thread), mask);
      uint32_t sum = static_cast<uint32_t>(thread);
      for (int step = 1; step < 32; step *= 2) sum += shuffle_xor(sum, step);
      chained[thread] = static_cast<float>(sum);
    });
    for (int thread = 0; thread < 64; ++thread) {
      CHECK(got[thread] == static_cast<float>(thread ^ mask), "mask %d, thread %d: %g", mask, thread, got[thread]);
      CHECK(chained[thread] == static_cast<float>(thread / 32 * 1024 + 496), "thread %d: %g", thread, chained[thread]);
    }
  }
}

void check_numbers() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const fastattn::testing::Float16 half{static_cast<uint16_t>(bits)};
    const fastattn::testing::BFloat16 brain{static_cast<uint16_t>(bits)};
    const float x = fastattn::testing::to_float(half), y = fastattn::testing::to_float(brain);
    CHECK(float_bits(f16_to_float(half.bits)) == float_bits(x), "float16 %04x: %g", bits, double(x));
    CHECK(float_bits(bf16_to_float(brain.bits)) == float_bits(y), "bfloat16 %04x: %g", bits, double(y));
    if (x == x) CHECK(pack_f16(x, -x) == (bits | (bits ^ 0x8000u) << 16), "float16 %04x: %08x", bits, pack_f16(x, -x));
    if (y == y) CHECK(pack_bf16(y, -y) == (bits | (bits ^ 0x8000u) << 16), "bfloat16 %04x", bits);
  }
  std::mt19937 random(11);
  for (int n = 0; n < 100000; ++n) {
    const float x = bits_float(static_cast<uint32_t>(random()));
    if (x != x) continue;
    fastattn::testing::Float16 half;
    fastattn::testing::BFloat16 brain;
    fastattn::testing::from_float(x, &half);
    fastattn::testing::from_float(x, &brain);
    CHECK(pack_f16(x, 0.0f) == half.bits, "%g: %08x", double(x), pack_f16(x, 0.0f));
    CHECK(pack_bf16(x, 0.0f) == brain.bits, "%g: %08x", double(x), pack_bf16(x, 0.0f));
    // Half of the last of the eleven bits at most, and ties go away from zero.
    const float rounded = bits_float(to_tf32(x));
    CHECK((to_tf32(x) & 0x1fffu) == 0, "%g", double(x));
    if (std::isnormal(x) && std::isfinite(rounded)) {
      CHECK(std::abs(double(rounded) - x) <= std::ldexp(1.0, std::ilogb(x) - 11), "%g: %g", double(x), double(rounded));
    }
  }
  CHECK(to_tf32(bits_float(0x3f801000u)) == 0x3f802000u && to_tf32(bits_float(0xbf801000u)) == 0xbf802000u, "ties");
  CHECK(std::isinf(bits_float(to_tf32(std::numeric_limits<float>::infinity()))), "infinity");
  CHECK(std::isnan(bits_float(to_tf32(bits_float(0x7fffffffu)))), "NaN");
  CHECK(exp2_approx(-std::numeric_limits<float>::infinity()) == 0.0f, "-inf");
  CHECK(exp2_approx(-140.0f) == 0.0f && exp2_approx(-126.0f) == 0x1p-126f && exp2_approx(3.0f) == 8.0f, "exp2");
  CHECK(std::isinf(exp2_approx(200.0f)) && std::isnan(exp2_approx(bits_float(0x7fc00000u))), "exp2");
}

// ---- Shared memory and copies --------------------------------------------------------------------------------------

void check_poison() {
  std::vector<uint32_t> got(2 * 32);
  run(2, 32, {}, [&] {
    const SharedAddress mine = shared_base() + 4u * static_cast<uint32_t>(thread_index());
    got[static_cast<size_t>(block_index()) * 32 + thread_index()] = load_shared_u32(mine);
    store_shared_u32(mine, 7);
  });
  for (const uint32_t bits : got) {
    CHECK(std::isnan(bits_float(bits)) && std::isnan(bf16_to_float(bits & 0xffffu)), "%08x", bits);
    CHECK(std::isnan(f16_to_float(bits & 0xffffu)) && std::isnan(f16_to_float(bits >> 16)), "%08x", bits);
  }
}

void check_copies() {
  alignas(16) uint32_t source[4] = {1, 2, 3, 4};
  for (const int bytes : {0, 4, 8, 16}) {
    U32x4 got{};
    run(1, 32, {}, [&] {
      if (thread_index() == 5) cp_async_16(shared_base() + 64, bytes == 0 ? nullptr : source, bytes);
      cp_async_commit();
      cp_async_wait<0>();
      if (thread_index() == 5) got = load_shared_u32x4(shared_base() + 64);
    });
    for (int n = 0; n < 4; ++n) {
      CHECK(got.x[n] == (4 * n < bytes ? source[n] : 0), "%d bytes, word %d: %u", bytes, n, got.x[n]);
    }
  }

  // A source that changes between the issue and the wait shows when it was read.
  int early = 0, late = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    for (const CopyTiming timing : {CopyTiming::kAtIssue, CopyTiming::kAtWait, CopyTiming::kRandom}) {
      Options options = with_seed(seed);
      options.cp_async_timing = timing;
      alignas(16) uint32_t changing[4] = {1, 1, 1, 1};
      uint32_t first = 0, second = 0;
      run(1, 32, options, [&] {
        if (thread_index() != 0) return;
        cp_async_16(shared_base(), changing, 16);
        cp_async_commit();
        changing[0] = 2;
        cp_async_16(shared_base() + 16, changing, 16);
        cp_async_commit();
        cp_async_wait<1>();
        changing[0] = 3;
        first = load_shared_u32(shared_base());
        cp_async_wait<0>();
        second = load_shared_u32(shared_base() + 16);
      });
      if (timing == CopyTiming::kAtIssue) CHECK(first == 1 && second == 2, "%u %u", first, second);
      if (timing == CopyTiming::kAtWait) CHECK(first == 2 && second == 3, "%u %u", first, second);
      if (timing == CopyTiming::kRandom) ++(second == 2 ? early : late);
    }
  }
  CHECK(early > 5 && late > 5, "%d early, %d late", early, late);
}

void check_addresses() {
  alignas(16) static unsigned char global[64];
  const auto base = [] { return shared_base(); };
  check_fails("beyond", 32, {"out of bounds", "offset 32768 of the block's 32768", name(7)},
              [&] { load_shared_u32(base() + kShared, at(7)); });
  check_fails("before", 32, {"out of bounds", "offset -4 "}, [&] { store_shared_u32(base() - 4, 1, at(7)); });
  check_fails("straddling", 32, {"out of bounds"}, [&] { load_shared_u32x4(base() + kShared, at(7)); });
  check_fails("odd word", 32, {"misaligned", name(7)}, [&] { load_shared_f32(base() + 2, at(7)); });
  check_fails("odd chunk", 32, {"misaligned", name(7)}, [&] { store_shared_f32x4(base() + 8, {}, at(7)); });
  check_fails("odd row", 32, {"ldmatrix", "misaligned", name(7)}, [&] {
    uint32_t r[4];
    ldmatrix_x4(r, base() + 4, at(7));
  });
  check_fails("far row", 32, {"ldmatrix", "out of bounds", name(7)}, [&] {
    uint32_t r[4];
    ldmatrix_x4_trans(r, base() + static_cast<uint32_t>(thread_index()) * 2048, at(7));
  });
  check_fails("copy from an odd address", 32, {"multiple of 16", name(7)},
              [&] { cp_async_16(base() + 16u * static_cast<uint32_t>(thread_index()), global + 4, 16, at(7)); });
  check_fails("copy of too much", 32, {"17 bytes", name(7)}, [&] { cp_async_16(base(), global, 17, at(7)); });
  check_fails("load from an odd address", 32, {"multiple of 16", name(7)},
              [&] { load_global_u32x4(global + 8, at(7)); });
  check_fails("store to an odd address", 32, {"multiple of 16", name(7)},
              [&] { store_global_u32x4(global + 8, {}, at(7)); });
}

// ---- Races ---------------------------------------------------------------------------------------------------------

void check_races() {
  const auto word = [](int n) { return shared_base() + 4u * static_cast<uint32_t>(n); };
  const std::string race = "data race";

  check_fails("store, load", 64, {race, name(1), name(2), "no barrier"}, [&] {
    store_shared_u32(word(thread_index()), 1, at(1));
    load_shared_u32(word(63 - thread_index()), at(2));
  });
  check_passes("store, barrier, load", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(63 - thread_index()));
  });
  check_fails("load, store", 64, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(63 - thread_index()), at(1));
    store_shared_u32(word(thread_index()), 2, at(2));
  });
  check_passes("load, barrier, store", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(63 - thread_index()));
    sync_block();
    store_shared_u32(word(thread_index()), 2);
  });
  check_fails("two stores", 64, {race, name(1)}, [&] { store_shared_u32(word(thread_index() % 63), 1, at(1)); });
  check_passes("many loads", 64, [&] { load_shared_u32(word(thread_index() % 7)); });
  check_passes("a thread with itself", 64, [&] {
    for (uint32_t n = 0; n < 3; ++n) store_shared_u32(word(thread_index()), load_shared_u32(word(thread_index())) + n);
  });
  // Four words of one chunk are four places.
  check_passes("neighbours", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    load_shared_u32(word(thread_index()));
  });
  check_fails("a chunk and one of its words", 64, {race, name(1), name(2)}, [&] {
    if (thread_index() == 40) store_shared_u32x4(word(8), {}, at(1));
    if (thread_index() == 3) load_shared_u32(word(11), at(2));
  });
  check_fails("the words of a chunk, then all of it", 64, {race, name(1), name(2)}, [&] {
    if (thread_index() >= 8 && thread_index() < 12) store_shared_u32(word(thread_index()), 1, at(1));
    sync_warp();
    if (thread_index() == 40) load_shared_u32x4(word(8), at(2));
  });

  // Within a warp sync_warp orders memory; other collectives and other warps' do not.
  check_passes("store, sync_warp, load", 64, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_warp();
    load_shared_u32(word(thread_index() ^ 31));
    sync_warp();
    store_shared_u32(word(thread_index()), 1);
  });
  check_fails("store, shuffle, load", 32, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1, at(1));
    shuffle_xor(1u, 1);
    load_shared_u32(word(thread_index() ^ 31), at(2));
  });
  check_fails("load, shuffle, store", 32, {race, name(1), name(2)}, [&] {
    load_shared_u32(word(thread_index() ^ 31), at(1));
    shuffle_xor(1u, 1);
    store_shared_u32(word(thread_index()), 1, at(2));
  });
  check_fails("sync_warp between warps", 64, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1, at(1));
    sync_warp();
    load_shared_u32(word(thread_index() ^ 63), at(2));
  });
  check_fails("a reader of each warp", 96, {race, name(1), name(2)}, [&] {
    store_shared_u32(word(thread_index()), 1);
    sync_block();
    load_shared_u32(word(5), at(1));
    sync_warp();
    sync_warp();
    if (thread_index() == 5) store_shared_u32(word(5), 2, at(2));
  });

  // ldmatrix reads for the whole warp.
  const auto row = [&](int n) { return word(4 * n); };
  check_fails("store, ldmatrix", 32, {race, name(1), name(2)}, [&] {
    uint32_t r[4];
    store_shared_u32x4(row(thread_index()), {}, at(1));
    ldmatrix_x4(r, row(thread_index()), at(2));
  });
  check_fails("ldmatrix, store", 64, {race, name(1), name(2)}, [&] {
    uint32_t r[4];
    store_shared_u32x4(row(thread_index()), {});
    sync_block();
    ldmatrix_x4(r, row(thread_index() % 32), at(1));
    store_shared_u32x4(row(thread_index()), {}, at(2));
  });
  check_passes("store, sync_warp, ldmatrix, sync_warp, store", 64, [&] {
    uint32_t r[4];
    store_shared_u32x4(row(thread_index()), {});
    sync_warp();
    ldmatrix_x4(r, row(thread_index()));
    sync_warp();
    store_shared_u32x4(row(thread_index()), {});
  });
}

// The detector against one that keeps every access and compares with all of them.
class EveryAccess {
 public:
  void sync_block() { ++block_; }
  void sync_warp(uint32_t warp) { ++warp_steps_[warp]; }
  // Of words [begin, end); a whole warp reads as no one thread.
  bool conflicts(uint32_t thread, bool as_warp, bool is_write, uint32_t begin, uint32_t end) {
    const uint32_t warp = thread / 32;
    const Access now{thread, as_warp, is_write, begin, end, block_, warp_steps_[warp], false};
    for (const Access& before : accesses_) {
      const bool overlap = before.begin < end && begin < before.end;
      const bool same_thread = before.thread == thread && !before.as_warp && !as_warp;
      const bool ordered =
          same_thread || before.block < block_ || (before.thread / 32 == warp && before.step < warp_steps_[warp]);
      if (overlap && (before.in_flight || ((before.is_write || is_write) && !ordered))) return true;
    }
    accesses_.push_back(now);
    return false;
  }
  void start_copy() { accesses_.back().in_flight = true; }
  // As a write at the time of the wait.
  void end_copy(uint32_t thread, uint32_t begin) {
    for (Access& access : accesses_) {
      if (!access.in_flight || access.begin != begin) continue;
      access.in_flight = false;
      access.block = block_;
      access.step = warp_steps_[thread / 32];
    }
  }

 private:
  struct Access {
    uint32_t thread;
    bool as_warp, is_write;
    uint32_t begin, end;
    int block, step;
    bool in_flight;
  };
  std::vector<Access> accesses_;
  int block_ = 0;
  int warp_steps_[3] = {};
};

void check_detector() {
  using fastattn::emulator::SharedMemory;
  std::mt19937 random(17);
  const uint32_t threads[] = {0, 1, 5, 32, 33, 64};
  SharedMemory shared;
  shared.resize(48);
  int found = 0;
  for (int round = 0; round < 20000; ++round) {
    shared.start_block();
    EveryAccess every;
    uint32_t clocks[3] = {};
    std::vector<std::pair<uint32_t, uint32_t>> copies;  // thread and place
    // Some rounds with few writes, for histories of many readers; some with few barriers.
    const uint32_t reads = 1 + random() % 8, syncs = 1 + random() % 6;
    for (int step = 0; step < 60; ++step) {
      const uint32_t thread = threads[random() % 6], warp = thread / 32;
      if (random() % (2 * syncs) == 0) {
        if (random() % 3 == 0) {
          every.sync_block();
          shared.tick_barrier();
        } else {
          every.sync_warp(warp);
          clocks[warp] = shared.tick();
        }
        continue;
      }
      if (!copies.empty() && random() % 4 == 0) {
        shared.end_copy(copies.back().second);
        every.end_copy(copies.back().first, copies.back().second / 4);
        copies.pop_back();
        continue;
      }
      const fastattn::emulator::Accessor who{thread, clocks[warp]};
      const uint32_t chunk = static_cast<uint32_t>(random() % 3),
                     word = 4 * chunk + static_cast<uint32_t>(random() % 4);
      const bool is_read = random() % (reads + 1) != 0;
      SharedMemory::Finding finding;
      bool expected;
      const uint32_t kind = static_cast<uint32_t>(random() % 3);
      if (kind == 0) {
        finding = is_read ? shared.read_word(4 * word, who) : shared.write_word(4 * word, who);
        expected = every.conflicts(thread, false, !is_read, word, word + 1);
      } else if (kind == 1 || !is_read) {
        const bool is_copy = !is_read && kind == 2;
        finding = is_read   ? shared.read_chunk(16 * chunk, who)
                  : is_copy ? shared.begin_copy(16 * chunk, who)
                            : shared.write_chunk(16 * chunk, who);
        expected = every.conflicts(thread, false, !is_read, 4 * chunk, 4 * chunk + 4);
        if (is_copy && !expected) {
          every.start_copy();
          copies.emplace_back(thread, 16 * chunk);
        }
      } else {
        finding = shared.read_chunk_as_warp(16 * chunk, who);
        expected = every.conflicts(thread, true, false, 4 * chunk, 4 * chunk + 4);
      }
      const bool conflict = finding.conflict != SharedMemory::Conflict::kNone;
      CHECK(conflict == expected, "round %d, step %d: %d, not %d", round, step, conflict, expected);
      if (conflict || expected) {
        ++found;
        break;
      }
    }
  }
  CHECK(found > 5000 && found < 19900, "%d of 20000 rounds with a race", found);
}

void check_copy_races() {
  alignas(16) static uint32_t source[4] = {1, 2, 3, 4};
  const auto chunk = [](int n) { return shared_base() + 16u * static_cast<uint32_t>(n); };
  for (const CopyTiming timing : {CopyTiming::kAtIssue, CopyTiming::kAtWait, CopyTiming::kRandom}) {
    Options options;
    options.cp_async_timing = timing;
    const auto check = [&](const char* what, std::initializer_list<std::string> parts, const auto& kernel) {
      const std::string text = failure(1, 64, options, kernel);
      for (const std::string& part : parts) CHECK(contains(text, part), "%s: '%s'", what, text.c_str());
      if (parts.size() == 0) CHECK(text.empty(), "%s: '%s'", what, text.c_str());
    };
    check("waited for, and a barrier", {}, [&] {
      cp_async_16(chunk(thread_index()), source, 16);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      load_shared_u32(chunk(63 - thread_index()));
    });
    check("not waited for", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      sync_block();
      load_shared_u32(chunk(63 - thread_index()), at(2));
    });
    check("not committed", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_wait<0>();
      load_shared_u32(chunk(thread_index()), at(2));
    });
    check("one group too many under way", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      cp_async_wait<1>();
      load_shared_u32x4(chunk(thread_index()), at(2));
    });
    check("the older of two groups", {}, [&] {
      cp_async_16(chunk(thread_index()), source, 16);
      cp_async_commit();
      cp_async_16(chunk(64 + thread_index()), source, 16);
      cp_async_commit();
      cp_async_wait<1>();
      load_shared_u32x4(chunk(thread_index()));
    });
    check("no barrier after the wait", {"no barrier", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      cp_async_wait<0>();
      load_shared_u32(chunk(63 - thread_index()), at(2));
    });
    check("a barrier before the wait only", {"data race", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      cp_async_commit();
      sync_block();
      cp_async_wait<0>();
      load_shared_u32(chunk(63 - thread_index()), at(2));
    });
    check("into what others still read", {"data race", name(1), name(2)}, [&] {
      store_shared_u32(chunk(thread_index()), 1);
      sync_block();
      load_shared_u32(chunk(63 - thread_index()), at(1));
      cp_async_16(chunk(thread_index()), source, 16, at(2));
    });
    check("a store into it", {"still copying", name(1), name(2)}, [&] {
      cp_async_16(chunk(thread_index()), source, 16, at(1));
      store_shared_u32(chunk(thread_index()), 1, at(2));
    });
    check("a copy left behind", {}, [&] {
      cp_async_16(chunk(thread_index()), source, 16);
      cp_async_commit();
    });
    check("and the next grid's use of its place", {}, [&] { store_shared_u32(chunk(thread_index()), 1); });
  }

  // With no detector to say so, what is under way reads as NaN.
  Options blind;
  blind.detect_races = false;
  blind.cp_async_timing = CopyTiming::kAtWait;
  float got = 0.0f;
  run(1, 32, blind, [&] {
    if (thread_index() != 0) return;
    store_shared_f32(shared_base(), 1.0f);
    cp_async_16(shared_base(), source, 16);
    got = load_shared_f32(shared_base());
  });
  CHECK(std::isnan(got), "%g", double(got));
}

// ---- Deadlocks -----------------------------------------------------------------------------------------------------

void check_deadlocks() {
  check_fails("one thread has gone home", 64,
              {"deadlock", name(1), "threads 0-32, 34-63 wait", "threads 33 have exited"}, [] {
                if (thread_index() != 33) sync_block(at(1));
              });
  check_fails("one warp has", 96, {"deadlock", name(1), "threads 0-31, 64-95 wait", "threads 32-63 have exited"}, [] {
    if (thread_index() / 32 != 1) sync_block(at(1));
  });
  check_fails("half of a warp at a shuffle", 32,
              {"deadlock", name(1), "threads 0-15 wait", "threads 16-31 have exited"}, [] {
                if (thread_index() / 16 != 1) shuffle_xor(1u, 1, at(1));
              });
  check_fails("a shuffle and a barrier", 32, {"deadlock", name(1), name(2)}, [] {
    if (thread_index() % 2 == 0) {
      shuffle_xor(1u, 1, at(1));
    } else {
      sync_block(at(2));
    }
  });
  check_fails("two collectives", 32, {"different collectives", name(1), name(2), "sync_warp", "ldmatrix"}, [] {
    uint32_t r[4];
    if (thread_index() < 8) {
      sync_warp(at(1));
    } else {
      ldmatrix_x4(r, shared_base(), at(2));
    }
  });
  check_fails("two places", 32, {"different collectives", name(1), name(2)}, [] {
    if (thread_index() < 8) {
      shuffle_xor(1u, 1, at(1));
    } else {
      shuffle_xor(2u, 1, at(2));
    }
  });
  check_fails("two barriers", 32, {"different collectives", name(1), name(2)}, [] {
    if (thread_index() < 8) {
      sync_block(at(1));
    } else {
      sync_block(at(2));
    }
  });
  check_passes("two barriers, but by warps", 64, [] {
    if (thread_index() < 32) {
      sync_block();
    } else {
      sync_block();
    }
  });
}

// ---- Bank conflicts ------------------------------------------------------------------------------------------------

uint64_t conflicts(const Report& report, int line, SiteKind kind) {
  const SiteCount* site = find_site(report, line, kind);
  return site ? site->bank_conflicts : ~uint64_t{0};
}

void check_bank_conflicts() {
  const auto base = [] { return shared_base(); };
  const auto thread = [] { return static_cast<uint32_t>(thread_index()); };
  struct {
    uint32_t words;      // between one lane's word and the next one's
    uint64_t conflicts;  // of a warp
  } const strides[] = {{0, 0}, {1, 0}, {2, 1}, {3, 0}, {4, 3}, {5, 0}, {8, 7}, {16, 15}, {32, 31}, {33, 0}};
  for (const auto& stride : strides) {
    const Report report = run(1, 64, {}, [&] {
      load_shared_u32(base() + 4 * (thread() % 32) * stride.words, at(1));
      sync_block();
      if (thread() < 32) store_shared_u32(base() + 4 * thread() * std::max(stride.words, 1u), 1, at(2));
    });
    CHECK(conflicts(report, 1, SiteKind::kLoadShared) == 2 * stride.conflicts, "stride %u: %d", stride.words,
          int(conflicts(report, 1, SiteKind::kLoadShared)));
    CHECK(conflicts(report, 2, SiteKind::kStoreShared) == stride.conflicts, "stride %u: %d", stride.words,
          int(conflicts(report, 2, SiteKind::kStoreShared)));
    CHECK(report.bank_conflicts_load == 2 * stride.conflicts && report.bank_conflicts_store == stride.conflicts,
          "stride %u", stride.words);
    CHECK(find_site(report, 1, SiteKind::kLoadShared)->calls == 64, "calls");
  }
  struct {
    uint32_t chunks;
    uint64_t conflicts;  // of eight lanes
  } const chunk_strides[] = {{0, 0}, {1, 0}, {2, 1}, {3, 0}, {4, 3}, {8, 7}, {9, 0}};
  for (const auto& stride : chunk_strides) {
    const Report report = run(1, 32, {}, [&] {
      uint32_t r[4];
      load_shared_u32x4(base() + 16 * thread() * stride.chunks, at(1));
      ldmatrix_x4(r, base() + 16 * thread() * stride.chunks, at(2));
      ldmatrix_x4_trans(r, base() + 16 * thread() * stride.chunks, at(3));
      sync_block();
      store_shared_u32x4(base() + 16 * thread() * std::max(stride.chunks, 1u), {}, at(4));
    });
    CHECK(conflicts(report, 1, SiteKind::kLoadShared) == 4 * stride.conflicts, "stride %u", stride.chunks);
    CHECK(conflicts(report, 2, SiteKind::kLdmatrix) == 4 * stride.conflicts, "stride %u", stride.chunks);
    CHECK(conflicts(report, 3, SiteKind::kLdmatrix) == 4 * stride.conflicts, "stride %u", stride.chunks);
    CHECK(conflicts(report, 4, SiteKind::kStoreShared) == 4 * stride.conflicts, "stride %u", stride.chunks);
  }
  // Rows of 128 bytes, one row for each lane of a phase: the XOR of chunk and row is what frees them.
  for (const uint32_t mask : {0u, 7u, 3u}) {
    const Report report = run(1, 32, {}, [&] {
      uint32_t r[4];
      const uint32_t row = thread() % 8, chunk = thread() / 8;
      ldmatrix_x4(r, base() + 128 * row + 16 * (chunk ^ (row & mask)), at(1));
    });
    const uint64_t expected = mask == 7 ? 0 : mask == 3 ? 4 : 28;
    CHECK(conflicts(report, 1, SiteKind::kLdmatrix) == expected, "mask %u: %d", mask,
          int(conflicts(report, 1, SiteKind::kLdmatrix)));
  }
  // A loop's accesses are as many as its rounds; a lane that leaves some out does not shift the others'.
  const Report loop = run(1, 32, {}, [&] {
    for (uint32_t n = 0; n < 3; ++n) {
      if (n != 1 || thread() % 2 == 0) load_shared_u32(base() + 4 * (32 * n + thread()), at(1));
      if (thread() < 16) load_shared_u32(base() + 8 * thread(), at(2));
      load_shared_u32(base() + 4 * ((thread() * 16 + n) % 1024), at(3));
    }
  });
  CHECK(conflicts(loop, 2, SiteKind::kLoadShared) == 0 && conflicts(loop, 3, SiteKind::kLoadShared) == 45, "%d %d",
        int(conflicts(loop, 2, SiteKind::kLoadShared)), int(conflicts(loop, 3, SiteKind::kLoadShared)));
  Options off;
  off.count_bank_conflicts = false;
  CHECK(run(1, 32, off, [&] { load_shared_u32(base() + 128 * thread()); }).bank_conflicts_load == 0, "switched off");
}

// ---- Order, faults, failures ---------------------------------------------------------------------------------------

// The order in which the threads of two blocks came by.
std::vector<int> trace(const Options& options, int os_threads) {
  std::vector<std::vector<int>> seen(3);
  run(
      3, 96, options,
      [&] {
        std::vector<int>& mine = seen[static_cast<size_t>(block_index())];
        mine.push_back(thread_index());
        for (int n = 0; n < 4; ++n) {
          sync_warp();
          mine.push_back(thread_index());
        }
        sync_block();
        mine.push_back(thread_index());
      },
      os_threads);
  std::vector<int> all;
  for (const auto& block : seen) all.insert(all.end(), block.begin(), block.end());
  return all;
}

void check_order() {
  const std::vector<int> first = trace(with_seed(1), 1);
  CHECK(first.size() == 3 * 96 * 6, "%d", int(first.size()));
  CHECK(trace(with_seed(1), 1) == first, "the same seed gave another order");
  CHECK(trace(with_seed(1), 3) == first, "three threads of the operating system gave another order");
  CHECK(trace(with_seed(2), 1) != first, "another seed gave the same order");
  CHECK(!std::equal(first.begin(), first.begin() + 96 * 6, first.begin() + 96 * 6), "blocks have the same order");
  Options options;
  options.random_order = false;
  const std::vector<int> in_order = trace(options, 1);
  for (int n = 0; n < 32; ++n) CHECK(in_order[n] == n, "%d came as number %d", in_order[n], n);

  // Blocks start in any order, but for every seed in one.
  const auto block_order = [](const Options& chosen) {
    std::vector<int64_t> order;
    run(20, 32, chosen, [&] {
      if (thread_index() == 0) order.push_back(block_index());
    });
    return order;
  };
  CHECK(block_order(with_seed(1)) == block_order(with_seed(1)), "the same seed gave another order of blocks");
  CHECK(block_order(with_seed(1)) != block_order(with_seed(2)), "another seed gave the same order of blocks");
  const std::vector<int64_t> blocks_in_order = block_order(options);
  for (int n = 0; n < 20; ++n) CHECK(blocks_in_order[n] == n, "block %d is number %d", int(blocks_in_order[n]), n);

  // Every block runs once, and knows its place.
  for (const int64_t blocks : {0, 1, 2, 7, 12}) {
    for (const int os_threads : {1, 4}) {
      std::vector<int> runs(static_cast<size_t>(blocks));
      const Report report = run(
          blocks, 32, with_seed(static_cast<uint64_t>(blocks)),
          [&] {
            if (thread_index() == 0) runs[static_cast<size_t>(block_index())] += grid_blocks() == blocks ? 1 : 100;
            sync_block(at(1));
          },
          os_threads);
      for (const int count : runs) CHECK(count == 1, "%d blocks: one ran %d times", int(blocks), count);
      const SiteCount* site = find_site(report, 1, SiteKind::kBarrier);
      CHECK((site ? site->calls : 0) == 32 * static_cast<uint64_t>(blocks), "%d blocks", int(blocks));
    }
  }
}

// Each of two buffers is filled by copies while the other one is summed; what thread t sums, others have copied.
struct Pipeline {
  static constexpr int kRounds = 5, kThreads = 64;
  const float* source;  // [kRounds][kThreads][4]
  float* sums;          // [kThreads]

  void operator()() const {
    const auto chunk = [](int round, int n) {
      return shared_base() + 16u * static_cast<uint32_t>(round % 2 * kThreads + n);
    };
    const int thread = thread_index();
    const auto load = [&](int round) {
      if (round < kRounds) cp_async_16(chunk(round, thread), source + 4 * (round * kThreads + thread), 16, at(10));
      cp_async_commit(at(11));
    };
    float sum = 0.0f;
    load(0);
    for (int round = 0; round < kRounds; ++round) {
      load(round + 1);
      cp_async_wait<1>(at(12));
      sync_block(at(13));
      const F32x4 x = load_shared_f32x4(chunk(round, (thread + 17 * round + 33) % kThreads), at(14));
      sum += x.x[0] + x.x[3];
      sync_block(at(15));
    }
    sums[thread] = sum;
  }
};

void check_faults() {
  static std::vector<float> storage(4 * Pipeline::kRounds * Pipeline::kThreads + 4);
  void* start = storage.data();
  size_t space = storage.size() * sizeof(float);
  auto* source = static_cast<float*>(std::align(16, space - 16, start, space));
  for (int n = 0; n < 4 * Pipeline::kRounds * Pipeline::kThreads; ++n) source[n] = static_cast<float>(n % 97);
  std::vector<float> sums(Pipeline::kThreads), expected(Pipeline::kThreads);
  const Pipeline pipeline{source, sums.data()};
  for (int thread = 0; thread < Pipeline::kThreads; ++thread) {
    for (int round = 0; round < Pipeline::kRounds; ++round) {
      const float* x = source + 4 * (round * Pipeline::kThreads + (thread + 17 * round + 33) % Pipeline::kThreads);
      expected[thread] += x[0] + x[3];
    }
  }
  Report report;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    sums.assign(sums.size(), 0.0f);
    report.merge(run(1, Pipeline::kThreads, with_seed(seed), pipeline));
    CHECK(sums == expected, "seed %d", int(seed));
  }
  CHECK(report.sites.size() == 6, "%d sites", int(report.sites.size()));
  CHECK(report.bank_conflicts_load == 0 && report.bank_conflicts_store == 0, "conflicts");

  int faults = 0;
  for (const SiteCount& site : report.sites) {
    CHECK(site.file == "test.cu" && site.calls >= 20 * Pipeline::kThreads * Pipeline::kRounds, "%s:%d: %d",
          site.file.c_str(), site.line, int(site.calls));
    if (site.kind != SiteKind::kBarrier && site.kind != SiteKind::kCpAsyncWait) continue;
    ++faults;
    int wrong = 0;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      Options options = with_seed(seed);
      options.skip_site = SkipSite{site.file, site.line, site.kind};
      const std::string text = failure(1, Pipeline::kThreads, options, pipeline);
      CHECK(contains(text, "data race"), "line %d left out: '%s'", site.line, text.c_str());
      // And without the detector, by what comes out.
      options.detect_races = false;
      sums.assign(sums.size(), 0.0f);
      CHECK(failure(1, Pipeline::kThreads, options, pipeline).empty(), "line %d left out", site.line);
      wrong += !(sums == expected);
    }
    CHECK(wrong >= 10, "line %d left out: %d of 20 wrong", site.line, wrong);
  }
  CHECK(faults == 3, "%d", faults);

  Options options;
  options.skip_site = SkipSite{"test.cu", 1, SiteKind::kWarpBarrier};
  const std::string text = failure(1, 32, options, [] {
    store_shared_u32(shared_base() + 4u * static_cast<uint32_t>(thread_index()), 1);
    sync_warp(at(1));
    load_shared_u32(shared_base());
  });
  CHECK(contains(text, "data race"), "'%s'", text.c_str());
}

void check_failures() {
  // Destructors of all threads run, and the next grid finds a working emulator.
  static int alive = 0;
  struct Counted {
    Counted() { ++alive; }
    ~Counted() { --alive; }
  };
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const std::string text = failure(1, 96, with_seed(seed), [] {
      const Counted counted;
      sync_block();
      if (thread_index() == 50) throw std::runtime_error("had enough");
      sync_block();
    });
    CHECK(contains(text, "block 0, thread 50: the kernel threw: had enough"), "'%s'", text.c_str());
    CHECK(alive == 0, "%d frames have not been left", alive);
  }
  const std::string thrown = failure(1, 32, {}, [] { throw 5; });
  CHECK(contains(thrown, "no std::exception"), "'%s'", thrown.c_str());

  // Which block is reported does not depend on who runs it.
  const auto fails_late = [] {
    if (block_index() % 5 == 3) load_shared_u32(shared_base() + kShared, at(1));
  };
  const std::string alone = failure(40, 32, with_seed(4), fails_late);
  for (int n = 0; n < 10; ++n) {
    const std::string together = failure(40, 32, with_seed(4), fails_late, 4);
    CHECK(together == alone && contains(alone, "block "), "'%s' and '%s'", together.c_str(), alone.c_str());
  }

  const auto refuses = [](int threads, size_t shared_bytes) {
    try {
      run_grid(1, threads, shared_bytes, {}, 1, [](const void*) {}, nullptr);
    } catch (const std::runtime_error&) {
      return true;
    }
    return false;
  };
  CHECK(refuses(0, 0) && refuses(33, 0) && refuses(1056, 0) && refuses(32, 228 << 10), "sizes that no GPU has");
  CHECK(!refuses(1024, 227 << 10) && !refuses(32, 0), "sizes that one has");
}

}  // namespace

int main() {
  check_mma<fastattn::testing::BFloat16, 16>("bf16", [](auto&... args) { mma_bf16(args...); }, true);
  check_mma<fastattn::testing::Float16, 16>("f16", [](auto&... args) { mma_f16(args...); }, true);
  check_mma<float, 8>("tf32", [](auto&... args) { mma_tf32(args...); }, false);
  check_ldmatrix();
  check_shuffles();
  check_numbers();
  check_poison();
  check_copies();
  check_addresses();
  check_races();
  check_detector();
  check_copy_races();
  check_deadlocks();
  check_bank_conflicts();
  check_order();
  check_faults();
  check_failures();
  return fastattn::testing::report("emulator_test");
}
