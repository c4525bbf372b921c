// The kernels of every instruction set that this processor has, in float32, bfloat16 and float16, forward and backward,
// against the plain float64 path on the same (rounded) inputs: attention_case.h.
#include <cstdlib>
#include <random>
#include <vector>

#include "testing/attention_case.h"

namespace {

using namespace fastattn::testing;
using fastattn::Causal;

// Shapes and features that each once made, or could make, a difference; then many at random.
std::vector<Case> make_cases(int random_cases, unsigned random_seed) {
  std::vector<Case> cases;
  cases = {
      {},
      {.B = 1, .Hq = 1, .Hkv = 1, .Lq = 1, .Lk = 1, .D = 1, .Dv = 1},
      {.Lq = 0},
      {.Lk = 0, .sinks = true, .d_lse = true},
      {.B = 0, .bias = kFullQ + kFullK, .sinks = true},
      {.Lq = 0, .bias = kFullH + kFullK, .sinks = true},
      {.Lk = 0, .bias = kFullH + kFullQ},
      {.Lq = 64, .Lk = 64, .D = 64, .Dv = 64},
      {.Lq = 65, .Lk = 129, .D = 65, .Dv = 33, .layout = Layout::kPadded, .kv_layout = Layout::kPadded},
      {.Lq = 127, .Lk = 63, .D = 40, .Dv = 40, .causal = Causal::kBottomRight},
      {.Lq = 63, .Lk = 127, .layout = Layout::kHeadsInRows, .causal = Causal::kTopLeft},
      {.Lq = 130, .Lk = 130, .causal = Causal::kBottomRight, .left = 20, .right = 0},
      {.Lq = 150, .Lk = 100, .left = 0, .right = 7, .kv_lengths = true},
      {.Hq = 8, .Lq = 1, .Lk = 1030, .D = 32, .Dv = 32, .kv_lengths = true},
      // Decoding: one, three and four rows a key head, whole and ragged vectors of head dims.
      {.Hq = 2, .Hkv = 2, .Lq = 1, .Lk = 201, .D = 72, .Dv = 100, .kv_lengths = true},
      {.Hq = 6, .Hkv = 2, .Lq = 1, .Lk = 131, .D = 65, .Dv = 33, .causal = Causal::kBottomRight, .left = 100},
      {.Hq = 8, .Hkv = 2, .Lq = 1, .Lk = 77, .D = 128, .Dv = 128, .bias = kFull, .mask = kFull, .sinks = true},
      {.B = 1, .Hq = 1, .Hkv = 1, .Lq = 3, .Lk = 2100, .bias = kFull, .bias_hides = true},
      {.B = 1, .Hq = 1, .Hkv = 1, .Lq = 1030, .Lk = 2, .mask = kFullQ},
      {.Lq = 20, .D = 256, .Dv = 256},
      {.D = 1, .Dv = 300},
      {.D = 300, .Dv = 1},
      {.d_lse = true, .dropout_p = 1.0},
      {.Lk = 200, .dropout_p = 0.5},
      {.scale = -3.0, .softcap = 2.0},
      {.scale = 1e-6},
      {.scale = 20.0, .softcap = 50.0},
      {.Lq = 100, .mask = kFullQ + kFullK, .sinks = true, .d_lse = true},
      {.Hq = 4, .layout = Layout::kBroadcast, .kv_layout = Layout::kBroadcast},
      {.Hq = 0, .Hkv = 2, .sinks = true},
      {.Hq = 0, .Hkv = 0, .bias = kFullQ + kFullK},
      // Enough keys that the backward pass cuts them into chunks, and enough work for every thread.
      {.B = 1, .Hq = 3, .Hkv = 1, .Lq = 130, .Lk = 900, .D = 32, .Dv = 24, .bias = kFull, .sinks = true, .d_lse = true},
      {.Hq = 2, .Hkv = 1, .Lq = 70, .Lk = 700, .D = 40, .bias = kFullK, .kv_lengths = true, .dropout_p = 0.3},
      {.Lq = 70, .Lk = 700, .causal = Causal::kBottomRight, .bias = kFullH + kFullK, .mask = kFullK, .sinks = true},
      {.B = 1, .Lq = 300, .Lk = 515, .D = 65, .Dv = 65, .causal = Causal::kTopLeft, .softcap = 3.0},
      {.B = 1, .Lq = 300, .Lk = 515, .causal = Causal::kBottomRight, .left = 100, .bias = kFullQ},
      {.B = 1, .Lq = 515, .Lk = 300, .causal = Causal::kBottomRight, .mask = kFull, .alibi = kFullH},
      kEverything,
  };
  // Every shape of a bias and of a mask.
  for (int full = 0; full <= kFull; ++full) {
    cases.push_back({.Hq = 4, .Lq = 70, .Lk = 71, .bias = full, .bias_is_float32 = full % 2 == 0});
    cases.push_back({.Hq = 4, .Lq = 70, .Lk = 71, .causal = Causal::kBottomRight, .mask = full});
  }

  std::mt19937 random(random_seed);
  for (int n = 0; n < random_cases; ++n) {
    Case c;
    c.B = pick(random, 1, 1, 2, 3);
    c.Hkv = pick(random, 1, 1, 2, 3);
    c.Hq = c.Hkv * pick(random, 1, 1, 2, 4, 7);
    c.D = pick(random, 1, 2, 3, 7, 8, 15, 16, 17, 32, 40, 63, 64, 65, 80, 96, 128, 160, 192, 255);
    c.Dv = chance(random, 0.6) ? c.D : pick(random, 1, 5, 8, 16, 31, 64, 72, 100, 128);
    do {
      c.Lq = pick(random, 1, 2, 3, 5, 8, 15, 16, 17, 31, 48, 63, 64, 65, 96, 127, 128, 129, 197, 260);
      c.Lk = pick(random, 1, 2, 3, 5, 8, 15, 16, 17, 31, 48, 63, 64, 65, 96, 127, 128, 129, 197, 260, 515);
    } while (c.B * c.Hq * c.Lq * c.Lk * (c.D + c.Dv) > 4000000 && (c.Lq > 1 || c.Lk > 1));
    c.layout = pick(random, Layout::kContiguous, Layout::kHeadsInRows, Layout::kPadded, Layout::kBroadcast);
    c.kv_layout = pick(random, Layout::kContiguous, Layout::kHeadsInRows, Layout::kPadded, Layout::kBroadcast);
    c.causal = pick(random, Causal::kNone, Causal::kNone, Causal::kTopLeft, Causal::kBottomRight, Causal::kBottomRight);
    if (chance(random, 0.3)) c.left = pick(random, 0, 1, 16, 40, 70, 130);
    if (chance(random, 0.2)) c.right = pick(random, 0, 1, 16, 40, 70, 130);
    if (chance(random, 0.2)) c.scale = pick(random, 0.05, 1.0, -0.5);
    if (chance(random, 0.25)) c.softcap = pick(random, 1.0, 30.0);
    if (chance(random, 0.4)) c.bias = pick(random, 0, 1, 2, 4, 8, 9, 10, 12, 13, 14, 15);
    c.bias_is_float32 = chance(random, 0.5);
    c.bias_hides = chance(random, 0.5);
    if (chance(random, 0.3)) c.mask = pick(random, 0, 1, 4, 8, 9, 12, 13, 14, 15);
    if (chance(random, 0.25)) c.alibi = pick(random, kFullH, kFullB + kFullH);
    c.sinks = chance(random, 0.3);
    c.kv_lengths = chance(random, 0.3);
    c.d_lse = chance(random, 0.4);
    if (chance(random, 0.25)) c.dropout_p = pick(random, 0.1, 0.5, 0.9);
    cases.push_back(c);
  }
  return cases;
}

// The conversions that the rest of this file relies on.
void check_half() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    Float16 half_back;
    BFloat16 brain_back;
    from_float(to_float(half), &half_back);
    from_float(to_float(brain), &brain_back);
    CHECK(half_back.bits == bits || to_float(half) != to_float(half), "float16 %04x", bits);
    CHECK(brain_back.bits == bits || to_float(brain) != to_float(brain), "bfloat16 %04x", bits);
  }
  struct {
    float x;
    uint16_t half, brain;
  } const answers[] = {
      {1.0f, 0x3c00, 0x3f80},
      {-2.5f, 0xc100, 0xc020},
      {1.0f + 0x1p-11f, 0x3c00, 0x3f80},
      {1.0f + 3 * 0x1p-11f, 0x3c02, 0x3f80},
      {1.0f + 0x1p-8f, 0x3c04, 0x3f80},
      {1.0f + 3 * 0x1p-8f, 0x3c0c, 0x3f82},
      {65504.0f, 0x7bff, 0x4780},
      {65520.0f, 0x7c00, 0x4780},
      {0x1p-24f, 0x0001, 0x3380},
      {0x1p-25f, 0x0000, 0x3300},
      {0x1.8p-25f, 0x0001, 0x3340},
  };
  for (const auto& a : answers) {
    Float16 half;
    BFloat16 brain;
    from_float(a.x, &half);
    from_float(a.x, &brain);
    CHECK(half.bits == a.half && brain.bits == a.brain, "%g: %04x %04x", static_cast<double>(a.x), half.bits,
          brain.bits);
  }
}

}  // namespace

// attention_test [number of random cases [seed]]
int main(int argc, char** argv) {
  const int random_cases = argc > 1 ? std::atoi(argv[1]) : 120;
  unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 20240607u;
  check_half();
  print_isas();
  for (const Case& c : make_cases(random_cases, seed)) {
    check_case<float>(c, ++seed);
    check_case<BFloat16>(c, seed);
    check_case<Float16>(c, seed);
  }
  for (const Case& c : {Case{}, Case{.Hq = 8, .Lq = 1, .Lk = 1030, .D = 40}, kEverything}) {
    check_shared_levels<float>(c, ++seed);
    check_shared_levels<Float16>(c, seed);
  }
  return report("attention_test");
}
