// Additive attention on every instruction set that this processor has, forward and backward: against the plain float64
// path like attention_test.cpp, and at the magnitudes and the NaN and infinities that its formulas meet
// (csrc/cpu/additive.h).
#include <bit>
#include <cstdlib>
#include <random>
#include <vector>

#include "testing/attention_case.h"

namespace {

using namespace fastattn::testing;
using fastattn::Causal;

// Both forms of w, with and without a GQA group.
std::vector<Case> make_cases(int random_cases, unsigned random_seed) {
  std::vector<Case> cases = {
      {.w = kFullH},
      {.w = 0},
      {.B = 1, .Hq = 1, .Hkv = 1, .Lq = 1, .Lk = 1, .D = 1, .Dv = 1, .w = 0},
      {.Lq = 0, .w = kFullH},
      {.Lk = 0, .d_lse = true, .w = 0},
      {.B = 0, .w = kFullH},
      {.B = 0, .w = 0},
      {.Hq = 0, .Hkv = 2, .w = 0},
      {.Lq = 64, .Lk = 64, .D = 64, .Dv = 64, .w = kFullH},
      {.Lq = 65,
       .Lk = 129,
       .D = 65,
       .Dv = 33,
       .layout = Layout::kPadded,
       .kv_layout = Layout::kPadded,
       .d_lse = true,
       .w = kFullH},
      {.Lq = 1, .Lk = 70, .D = 130, .Dv = 50, .kv_lengths = true, .w = 0},
      {.Lq = 5, .Lk = 300, .D = 33, .causal = Causal::kBottomRight, .d_lse = true, .w = kFullH},
      {.Lq = 72, .Lk = 210, .D = 24, .causal = Causal::kTopLeft, .w = 0},  // a rest of eight rows
      {.Lq = 127, .Lk = 63, .D = 40, .causal = Causal::kBottomRight, .w = kFullH},
      {.Lq = 130, .Lk = 130, .causal = Causal::kBottomRight, .left = 20, .right = 0, .w = kFullH},
      {.Lq = 33, .Lk = 205, .mask = kFullB + kFullQ + kFullK, .w = kFullH},
      {.Lq = 40, .Lk = 65, .D = 17, .kv_lengths = true, .d_lse = true, .dropout_p = 0.4, .w = 0},
      {.d_lse = true, .dropout_p = 1.0, .w = kFullH},
      {.D = 1, .Dv = 300, .w = kFullH},
      {.D = 300, .Dv = 1, .w = 0},
      {.Hq = 6, .Lq = 20, .Lk = 30, .layout = Layout::kHeadsInRows, .kv_layout = Layout::kHeadsInRows, .w = 0},
      {.Hq = 6, .Lq = 20, .Lk = 30, .layout = Layout::kBroadcast, .kv_layout = Layout::kBroadcast, .w = kFullH},
      // Enough keys for chunks of them, and rows for more than one super-block; GQA.
      {.B = 1, .Hq = 3, .Hkv = 1, .Lq = 70, .Lk = 900, .D = 20, .Dv = 24, .d_lse = true, .w = kFullH},
      {.B = 1, .Hq = 4, .Hkv = 2, .Lq = 600, .Lk = 520, .D = 9, .Dv = 8, .causal = Causal::kBottomRight, .w = 0},
  };
  Case everything = kEverything;
  everything.softcap = 0.0;
  everything.bias = everything.alibi = kNone;
  everything.bias_hides = everything.sinks = false;
  everything.w = kFullH;
  cases.push_back(everything);
  // Every formula, and tiles next to each other that take different ones.
  for (const double magnitude : {1e-3, 0.2, 4.0, 10.0, 60.0, 200.0}) {
    cases.push_back({.Lq = 70, .Lk = 250, .D = 20, .d_lse = true, .w = kFullH, .qk_magnitude = magnitude});
    cases.push_back({.Lq = 3, .Lk = 50, .D = 33, .d_lse = true, .w = 0, .qk_magnitude = magnitude});
  }
  std::mt19937 random(random_seed);
  for (int n = 0; n < random_cases; ++n) {
    Case c;
    c.B = pick(random, 1, 1, 2, 3);
    c.Hkv = pick(random, 1, 1, 2, 3);
    c.Hq = c.Hkv * pick(random, 1, 1, 2, 4);
    c.D = pick(random, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 40, 64, 65, 100, 128, 255);
    c.Dv = chance(random, 0.6) ? c.D : pick(random, 1, 5, 8, 16, 31, 64, 100);
    do {
      c.Lq = pick(random, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 63, 64, 65, 71, 128, 129, 260);
      c.Lk = pick(random, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 63, 64, 65, 127, 129, 205, 260, 515);
    } while (c.B * c.Hq * c.Lq * c.Lk * (8 * c.D + c.Dv) > 4000000 && (c.Lq > 1 || c.Lk > 1));
    c.layout = pick(random, Layout::kContiguous, Layout::kHeadsInRows, Layout::kPadded, Layout::kBroadcast);
    c.kv_layout = pick(random, Layout::kContiguous, Layout::kHeadsInRows, Layout::kPadded, Layout::kBroadcast);
    c.causal = pick(random, Causal::kNone, Causal::kNone, Causal::kTopLeft, Causal::kBottomRight);
    if (chance(random, 0.3)) c.mask = pick(random, 0, 1, 4, 8, 9, 12, 13, 14, 15);
    c.kv_lengths = chance(random, 0.3);
    c.d_lse = chance(random, 0.5);
    if (chance(random, 0.25)) c.dropout_p = pick(random, 0.1, 0.5, 0.9);
    c.w = pick(random, 0, kFullH);
    c.qk_magnitude = pick(random, 1e-3, 0.3, 1.0, 1.0, 1.0, 3.0, 30.0, 200.0);
    c.w_magnitude = pick(random, 0.1, 1.0, 1.0);
    cases.push_back(c);
  }
  return cases;
}

struct Pair {
  double q, k;
};

// Head h has one key, `rows` rows and D = 1, all of pairs[h]: its formula follows from that pair alone. With one key,
// lse is the score, w tanh(q + k); and with a d_lse of 1 for row 0 alone, dw is tanh(q + k), and dq and dk are its
// derivative times w.
Results<float> run_pairs(const std::vector<Pair>& pairs, int64_t rows) {
  const int64_t n = static_cast<int64_t>(pairs.size());
  const Case c{.B = 1, .Hq = n, .Hkv = n, .Lq = rows, .Lk = 1, .D = 1, .Dv = 1, .d_lse = true, .w = kFullH};
  std::mt19937 random(1);
  Inputs<float> in = make_inputs<float>(c, random);
  in.d_lse.assign(in.d_lse.size(), 0.0f);
  for (int64_t h = 0; h < n; ++h) {
    const Pair& pair = pairs[static_cast<size_t>(h)];
    for (int64_t i = 0; i < rows; ++i) in.q.at(0, h, i, 0) = static_cast<float>(pair.q);
    in.k.at(0, h, 0, 0) = static_cast<float>(pair.k);
    in.w.at(0, 0, h, 0) = 1.0f;
    in.d_lse[static_cast<size_t>(h * rows)] = 1.0f;
  }
  return run(c, in, fastattn::cpu::serial());
}

// Few rows and many are computed in different layouts.
constexpr int64_t kRowCounts[] = {1, 20};

// tanh and its derivative are as precise as a float32 tanh of float32 q + k, at every magnitude.
void check_precision() {
  std::vector<Pair> pairs;
  const double magnitudes[] = {1e-30, 1e-6, 1e-3, 0.02, 0.3,  0.99, 1.01, 3.0,   8.0, 12.9,
                               13.1,  17.0, 25.0, 30.0, 31.0, 44.0, 90.0, 200.0, 3e38};
  for (const double q : magnitudes) {
    for (const double k : magnitudes) {
      for (const double near : {1.0, 0.999, 0.5}) {
        for (const double sign : {1.0, -1.0}) {
          pairs.push_back({sign * q, sign * k * near});
          pairs.push_back({sign * q, -sign * k * near});
        }
      }
    }
  }
  for (Pair& pair : pairs) {
    pair = {static_cast<double>(static_cast<float>(pair.q)), static_cast<double>(static_cast<float>(pair.k))};
  }
  on_every_isa([&](const char* isa) {
    double worst_t = 0.0, worst_derivative = 0.0;
    for (const int64_t rows : kRowCounts) {
      Results<float> got = run_pairs(pairs, rows);
      for (size_t n = 0; n < pairs.size(); ++n) {
        const double q = pairs[n].q, k = pairs[n].k;
        const int64_t h = static_cast<int64_t>(n);
        const double t = std::tanh(q + k), derivative = 1.0 - t * t;
        const double lse = got.lse.at(0, h, 0, 0), dw = got.dw.at(0, 0, h, 0);
        const double dq = got.dq.at(0, h, 0, 0), dk = got.dk.at(0, h, 0, 0);
        // A rounding of q + k moves tanh by as much times the derivative. Beyond 1, errors are those of numbers near 1.
        const bool is_small = std::abs(q) <= 1.0 && std::abs(k) <= 1.0;
        const double limit = 0x1p-24 * (4 * (std::abs(t) + derivative * std::abs(q + k)) +
                                        (is_small ? 4 * (std::abs(q) + std::abs(k)) : 3));
        CHECK(std::abs(lse - t) <= limit, "%s: tanh(%g + %g) is %.9g, not %.9g: off by %g, limit %g", isa, q, k, lse, t,
              std::abs(lse - t), limit);
        CHECK(std::abs(dw - t) <= limit, "%s: dw of tanh(%g + %g) is %.9g, not %.9g", isa, q, k, dw, t);
        CHECK(std::abs(dq - derivative) <= 2 * limit + 0x1p-24, "%s: dq at %g + %g is %.9g, not %.9g", isa, q, k, dq,
              derivative);
        CHECK(dq == dk, "%s: dq %.9g, dk %.9g at %g + %g", isa, dq, dk, q, k);
        worst_t = std::max(worst_t, std::abs(lse - t));
        worst_derivative = std::max(worst_derivative, std::abs(dq - derivative));
      }
    }
    std::printf("%s: tanh is off by %.2g at most, its derivative by %.2g\n", isa, worst_t, worst_derivative);
  });
}

// Scores of tiny q and k with a large w: the errors are relative to what is summed, not to the sum of w.
void check_tiny_inputs() {
  const double magnitudes[] = {1e-6, 1e-3, 0.05};
  for (const double magnitude : magnitudes) {
    for (const int64_t Lq : {1, 40}) {
      const Case c{.B = 1,
                   .Hq = 2,
                   .Hkv = 2,
                   .Lq = Lq,
                   .Lk = 1,
                   .D = 200,
                   .Dv = 8,
                   .d_lse = true,
                   .w = kFullH,
                   .qk_magnitude = magnitude,
                   .w_magnitude = 1.0 / magnitude};
      std::mt19937 random(7);
      Inputs<float> in = make_inputs<float>(c, random);
      // All of one sign, which is what the sum of w would be largest for.
      in.w.for_each(
          [&](int64_t a, int64_t b, int64_t i, int64_t d) { in.w.at(a, b, i, d) = std::abs(in.w.at(a, b, i, d)); });
      Inputs<double> wide = to_float64(c, in);
      Results<double> expected = run(c, wide, fastattn::cpu::serial());
      on_every_isa([&](const char* isa) {
        Results<float> got = run(c, in, threads(2));
        expected.lse.for_each([&](int64_t b, int64_t h, int64_t i, int64_t) {
          double terms = 0.0;
          for (int64_t d = 0; d < c.D; ++d) {
            terms += wide.w.at(0, 0, h, d) * (std::abs(wide.q.at(b, h, i, d)) + std::abs(wide.k.at(b, h, 0, d)));
          }
          const double error = std::abs(got.lse.at(b, h, i, 0) - expected.lse.at(b, h, i, 0));
          CHECK(error <= 0x1p-24 * terms, "%s: magnitude %g: score %.9g, not %.9g", isa, magnitude,
                static_cast<double>(got.lse.at(b, h, i, 0)), expected.lse.at(b, h, i, 0));
        });
        expected.dw.for_each([&](int64_t, int64_t, int64_t h, int64_t d) {
          double terms = 0.0;
          for (int64_t i = 0; i < Lq; ++i) {
            terms += std::abs(wide.d_lse[static_cast<size_t>(h * Lq + i)]) *
                     (std::abs(wide.q.at(0, h, i, d)) + std::abs(wide.k.at(0, h, 0, d)));
          }
          const double error = std::abs(got.dw.at(0, 0, h, d) - expected.dw.at(0, 0, h, d));
          CHECK(error <= 0x1p-22 * terms, "%s: magnitude %g: dw %.9g, not %.9g", isa, magnitude,
                static_cast<double>(got.dw.at(0, 0, h, d)), expected.dw.at(0, 0, h, d));
        });
      });
    }
  }
}

// A row or key with numbers far beyond the others, in tiles that have all magnitudes; and q and k that cancel exactly.
template <class T>
void check_mixed_magnitudes() {
  const Case c{.B = 1, .Hq = 2, .Hkv = 2, .Lq = 140, .Lk = 460, .D = 12, .Dv = 8, .d_lse = true, .w = kFullH};
  std::mt19937 random(3);
  Inputs<T> in = make_inputs<T>(c, random);
  const auto set = [&](Tensor<T>& x, int64_t h, int64_t row, double value) {
    for (int64_t d = 0; d < c.D; ++d) from_double(d % 2 ? value : -value, &x.at(0, h, row, d));
  };
  for (int64_t h = 0; h < c.Hq; ++h) {
    set(in.q, h, 3, 200.0);   // the first block of rows is far,
    set(in.k, h, 7, -200.0);  // and the first block of keys: exactly opposite
    set(in.k, h, 8, -199.0);
    set(in.k, h, 9, 14.0);
    set(in.q, h, 70, -12.0);  // the second block of rows is near
    set(in.q, h, 71, 12.0);
    for (int64_t row = 128; row < c.Lq; ++row) set(in.q, h, row, 1e-3);  // the last one is tiny,
    for (int64_t row = 230; row < c.Lk; ++row) set(in.k, h, row, 2e-3 * static_cast<double>(row - 300));  // as are keys
  }
  check_inputs(c, in, {1, 2, 3, 8});
}

// Infinite numbers are at the ends of tanh, and inf - inf and NaN are NaN in what they touch and nowhere else.
void check_not_finite() {
  const double inf = kInfinity;
  const std::vector<Pair> pairs = {{inf, 1.0},   {-inf, 1.0}, {inf, -200.0}, {1.0, -inf},   {inf, inf},
                                   {-inf, -inf}, {0.0, inf},  {3e38, 3e38},  {-3e38, -3e38}};
  on_every_isa([&](const char* isa) {
    for (const int64_t rows : kRowCounts) {
      Results<float> got = run_pairs(pairs, rows), opposite = run_pairs({{inf, -inf}, {-inf, inf}}, rows);
      for (size_t n = 0; n < pairs.size(); ++n) {
        const int64_t h = static_cast<int64_t>(n);
        const double t = std::tanh(pairs[n].q + pairs[n].k);
        const double lse = got.lse.at(0, h, 0, 0), dq = got.dq.at(0, h, 0, 0);
        CHECK(lse == t && dq == 0.0, "%s: tanh(%g + %g) is %g, its derivative %g", isa, pairs[n].q, pairs[n].k, lse,
              dq);
      }
      for (int64_t h = 0; h < 2; ++h) {
        const float lse = opposite.lse.at(0, h, 0, 0), dq = opposite.dq.at(0, h, 0, 0);
        CHECK(lse != lse && dq != dq, "%s: inf - inf gives %g, %g", isa, lse, dq);
      }
    }

    for (const int64_t Lq : {2, 70}) {
      for (const double magnitude : {0.1, 1.0, 60.0}) {
        for (const uint32_t bits : {0x7fc00000u, 0xffffffffu, 0x7fc00001u}) {
          const Case c{
              .B = 1, .Hq = 1, .Hkv = 1, .Lq = Lq, .Lk = 90, .D = 20, .Dv = 9, .w = 0, .qk_magnitude = magnitude};
          std::mt19937 random(5);
          Inputs<float> in = make_inputs<float>(c, random);
          Results<float> clean = run(c, in, fastattn::cpu::serial());
          in.q.at(0, 0, 1, 17) = std::bit_cast<float>(bits);
          Results<float> got = run(c, in, fastattn::cpu::serial());
          for (int64_t i = 0; i < c.Lq; ++i) {
            const float o = got.o.at(0, 0, i, 3), lse = got.lse.at(0, 0, i, 0), dq = got.dq.at(0, 0, i, 3);
            if (i == 1) {
              CHECK(o != o && lse != lse && dq != dq, "%s: NaN %08x in q, magnitude %g: o %g, lse %g, dq %g", isa, bits,
                    magnitude, o, lse, dq);
            } else {
              CHECK(o == clean.o.at(0, 0, i, 3) && lse == clean.lse.at(0, 0, i, 0) && dq == clean.dq.at(0, 0, i, 3),
                    "%s: NaN %08x in row 1 of q, magnitude %g, changes row %d", isa, bits, magnitude, int(i));
            }
          }
          in.q.at(0, 0, 1, 17) = 0.5f;
          in.k.at(0, 0, 4, 2) = std::bit_cast<float>(bits);
          got = run(c, in, fastattn::cpu::serial());
          for (int64_t i = 0; i < c.Lq; ++i) {
            const float o = got.o.at(0, 0, i, 3), lse = got.lse.at(0, 0, i, 0);
            CHECK(o != o && lse != lse, "%s: NaN %08x in k: o %g, lse %g", isa, bits, o, lse);
          }
        }
      }
    }
  });
}

// The levels compute the same, but for rounding.
void check_levels_agree() {
  const Case c{.Lq = 100, .Lk = 230, .D = 70, .Dv = 20, .d_lse = true, .w = kFullH};
  std::mt19937 random(11);
  Inputs<float> in = make_inputs<float>(c, random);
  Results<double> first;
  on_every_isa([&](const char* isa) {
    Results<float> got = run(c, in, threads(2));
    if (first.o.storage.empty()) {
      first.o = got.o.to_float64();
      first.lse = got.lse.to_float64();
      first.dq = got.dq.to_float64();
      first.dk = got.dk.to_float64();
      first.dv = got.dv.to_float64();
      first.dw = got.dw.to_float64();
    }
    const std::string label = std::string(isa) + " against the lowest level";
    compare("o", label, got.o, first.o, 1e-5);
    compare("lse", label, got.lse, first.lse, 1e-6);
    compare("dq", label, got.dq, first.dq, 2e-5);
    compare("dk", label, got.dk, first.dk, 2e-5);
    compare("dv", label, got.dv, first.dv, 1e-5);
    compare("dw", label, got.dw, first.dw, 2e-5);
  });
}

}  // namespace

// additive_test [number of random cases [seed]]
int main(int argc, char** argv) {
  const int random_cases = argc > 1 ? std::atoi(argv[1]) : 60;
  unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 20240611u;
  print_isas();
  check_precision();
  check_tiny_inputs();
  check_mixed_magnitudes<float>();
  check_mixed_magnitudes<BFloat16>();
  check_mixed_magnitudes<Float16>();
  check_not_finite();
  check_levels_agree();
  for (const Case& c : make_cases(random_cases, seed)) {
    check_case<float>(c, ++seed, {2, 3, 8});
    check_case<BFloat16>(c, seed);
    check_case<Float16>(c, seed);
  }
  const Case shared{.Lq = 70, .Lk = 130, .D = 20, .d_lse = true, .w = kFullH};
  check_shared_levels<float>(shared, ++seed);
  check_shared_levels<BFloat16>(shared, seed);
  check_shared_levels<Float16>(shared, seed);
  return report("additive_test");
}
