// The summary of attention weights on every instruction set, in float32, bfloat16 and float16, against the plain
// float64 path on the same (rounded) inputs; and that path against the weights themselves.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/plain_rows.h"
#include "testing/attention_case.h"

namespace {

using namespace fastattn::testing;
using fastattn::AttentionParams;
using fastattn::Causal;
using fastattn::kMaxTopK;
using fastattn::SummaryParams;
using fastattn::cpu::serial;
using fastattn::cpu::plain::is_hidden;
using fastattn::cpu::plain::Row;

// What is asked of a summary, beside the case.
struct Wanted {
  int64_t top_k = 0;
  bool mass = true;
  // Which rows count: fresh ones for each (b, h), the same for all heads, or all.
  enum Rows { kAll, kSharedByHeads, kOwn } rows = kAll;
  bool statistics = true;
};

std::vector<uint8_t> make_row_mask(const Case& c, Wanted::Rows rows, std::mt19937& random) {
  std::vector<uint8_t> mask(static_cast<size_t>(c.B * (rows == Wanted::kOwn ? c.Hq : 1) * c.Lq));
  for (size_t n = 0; n < mask.size(); ++n) mask[n] = n / 64 % 3 == 1 ? 0 : random() % 3 != 0;  // whole blocks, too
  return mask;
}

template <class T>
struct Summary {
  Tensor<Accumulator<T>> entropy, max_weight, lse, row_max, row_sum;  // [B, Hq, Lq, 1]
  Tensor<Accumulator<T>> top_weights;                                 // [B, Hq, Lq, top_k]
  Tensor<Accumulator<T>> key_mass;                                    // [B, Hq, Lk, 1]
  std::vector<int64_t> top_index;
};

template <class T>
Summary<T> summarise(const Case& c, Inputs<T>& in, const Wanted& wanted, const std::vector<uint8_t>& row_mask,
                     const Parallel& parallel) {
  Summary<T> r;
  SummaryParams sp;
  AttentionParams& p = sp.attention;
  p = make_params(c, in);
  p.v = nullptr;
  p.Dv = 0;
  p.dropout_p = 0.0;
  for (auto* stat : {&r.entropy, &r.max_weight, &r.lse, &r.row_max, &r.row_sum}) {
    *stat = {c.B, c.Hq, c.Lq, 1, Layout::kContiguous};
  }
  sp.entropy = r.entropy.data();
  sp.max_weight = r.max_weight.data();
  p.lse = r.lse.data();
  if (wanted.statistics) {
    p.row_max = r.row_max.data();
    p.row_sum = r.row_sum.data();
  }
  sp.top_k = wanted.top_k;
  r.top_weights = {c.B, c.Hq, c.Lq, wanted.top_k, Layout::kContiguous};
  r.top_index.assign(static_cast<size_t>(c.B * c.Hq * c.Lq * wanted.top_k), -7);
  sp.top_weights = r.top_weights.data();
  sp.top_index = r.top_index.data();
  if (wanted.mass) {
    r.key_mass = {c.B, c.Hq, c.Lk, 1, Layout::kContiguous};
    sp.key_mass = r.key_mass.data();
  }
  if (wanted.rows != Wanted::kAll) {
    sp.row_mask = row_mask.data();
    const bool is_own = wanted.rows == Wanted::kOwn;
    sp.row_mask_stride[0] = (is_own ? c.Hq : 1) * c.Lq;
    sp.row_mask_stride[1] = is_own ? c.Lq : 0;
    sp.row_mask_stride[2] = 1;
  }
  fastattn::cpu::attention_summary(sp, parallel);
  return r;
}

template <class T>
bool same_bits(const Summary<T>& a, const Summary<T>& b) {
  return same_bits(a.entropy, b.entropy) && same_bits(a.max_weight, b.max_weight) && same_bits(a.lse, b.lse) &&
         same_bits(a.row_max, b.row_max) && same_bits(a.row_sum, b.row_sum) &&
         same_bits(a.top_weights, b.top_weights) && same_bits(a.key_mass, b.key_mass) && a.top_index == b.top_index;
}

// The weights of a row, in the plainest way; sink_weight is that of the sink.
std::vector<double> weights_of(const Row& row, double* sink_weight) {
  std::vector<double> scores(static_cast<size_t>(row.p.Lk), -kInfinity);
  row.compute_scores(scores.data() + row.begin, nullptr);
  double largest = -kInfinity;
  for (const double score : scores) largest = std::max(largest, score);
  *sink_weight = 0.0;
  if (is_hidden(largest)) return std::vector<double>(scores.size(), 0.0);
  const double m = std::max(largest, row.sink());
  *sink_weight = std::exp(row.sink() - m);
  double l = *sink_weight;
  for (double& score : scores) l += score = std::exp(score - m);
  for (double& score : scores) score /= l;
  *sink_weight /= l;
  return scores;
}

// The float64 summary against the weights.
void check_against_weights(const Case& c, Inputs<double>& in, Summary<double>& got, const Wanted& wanted,
                           const std::vector<uint8_t>& row_mask, const std::string& label) {
  const AttentionParams p = make_params(c, in);
  const auto is_close = [](double x, double y) { return std::abs(x - y) <= 1e-11 * std::max(1.0, std::abs(y)); };
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t h = 0; h < c.Hq; ++h) {
      std::vector<double> mass(static_cast<size_t>(c.Lk));
      for (int64_t i = 0; i < c.Lq; ++i) {
        const Row row(p, b, h, i);
        double sink_weight;
        std::vector<double> weights = weights_of(row, &sink_weight);
        double entropy = sink_weight > 0.0 ? -sink_weight * std::log(sink_weight) : 0.0;
        for (const double w : weights) entropy -= w > 0.0 ? w * std::log(w) : 0.0;
        CHECK(is_close(got.entropy.at(b, h, i, 0), entropy), "%s: entropy[%d, %d, %d] is %g, not %g", label.c_str(),
              int(b), int(h), int(i), got.entropy.at(b, h, i, 0), entropy);
        const double largest = c.Lk > 0 ? *std::max_element(weights.begin(), weights.end()) : 0.0;
        CHECK(is_close(got.max_weight.at(b, h, i, 0), largest), "%s: max_weight %g, not %g", label.c_str(),
              got.max_weight.at(b, h, i, 0), largest);
        const int64_t head = wanted.rows == Wanted::kOwn ? b * c.Hq + h : b;
        if (wanted.rows == Wanted::kAll || row_mask[static_cast<size_t>(head * c.Lq + i)] != 0) {
          for (size_t j = 0; j < mass.size(); ++j) mass[j] += weights[j];
        }
        std::sort(weights.rbegin(), weights.rend());
        for (int64_t t = 0; t < wanted.top_k; ++t) {
          const double expected = t < c.Lk ? weights[static_cast<size_t>(t)] : 0.0;
          CHECK(is_close(got.top_weights.at(b, h, i, t), expected), "%s: top_weights %g, not %g", label.c_str(),
                got.top_weights.at(b, h, i, t), expected);
        }
      }
      for (int64_t j = 0; j < c.Lk && wanted.mass; ++j) {
        CHECK(is_close(got.key_mass.at(b, h, j, 0), mass[static_cast<size_t>(j)]), "%s: key_mass %g, not %g",
              label.c_str(), got.key_mass.at(b, h, j, 0), mass[static_cast<size_t>(j)]);
      }
    }
  }
}

// Each key is there once, visible, its own weight beside it, in the order of the float64 scores as far as the type can
// tell them apart.
template <class T>
void check_top(const Case& c, Inputs<double>& wide, Summary<T>& got, Summary<double>& expected, int64_t top_k,
               double tolerance, const std::string& label) {
  const AttentionParams p = make_params(c, wide);
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t h = 0; h < c.Hq; ++h) {
      for (int64_t i = 0; i < c.Lq; ++i) {
        const Row row(p, b, h, i);
        double sink_weight;
        const std::vector<double> weights = weights_of(row, &sink_weight);
        std::vector<bool> is_taken(static_cast<size_t>(c.Lk));
        for (int64_t t = 0; t < top_k; ++t) {
          const int64_t index = got.top_index[static_cast<size_t>(row.stat() * top_k + t)];
          const int64_t best = expected.top_index[static_cast<size_t>(row.stat() * top_k + t)];
          const double weight = got.top_weights.at(b, h, i, t);
          if (best < 0) {
            CHECK(index == -1 && weight == 0.0, "%s [%d, %d, %d]: %d, %g past the visible keys", label.c_str(), int(b),
                  int(h), int(i), int(index), weight);
            continue;
          }
          const bool is_new = index >= 0 && index < c.Lk && !is_taken[static_cast<size_t>(index)];
          CHECK(is_new, "%s [%d, %d, %d]: top_index[%d] is %d, not %d", label.c_str(), int(b), int(h), int(i), int(t),
                int(index), int(best));
          if (!is_new) continue;
          is_taken[static_cast<size_t>(index)] = true;
          const double own = weights[static_cast<size_t>(index)];
          CHECK(std::abs(weight - own) <= tolerance && std::abs(own - expected.top_weights.at(b, h, i, t)) <= tolerance,
                "%s [%d, %d, %d]: number %d is key %d with %g; its weight is %g; key %d has %g", label.c_str(), int(b),
                int(h), int(i), int(t), int(index), weight, own, int(best), expected.top_weights.at(b, h, i, t));
        }
      }
    }
  }
}

template <class T>
constexpr double kTolerance = std::is_same_v<T, Float16> ? 1e-4 : 2e-5;  // next to -1000: see attention_case.h

template <class T>
void check_summary_of(const Case& c, const Wanted& wanted, unsigned seed) {
  std::mt19937 random(seed);
  Inputs<T> in = make_inputs<T>(c, random);
  const std::vector<uint8_t> row_mask = make_row_mask(c, wanted.rows, random);
  Inputs<double> wide = to_float64(c, in);
  char text[60];
  std::snprintf(text, sizeof text, " top%d mass%d rows%d", int(wanted.top_k), wanted.mass, int(wanted.rows));
  const std::string what = c.name() + text;
  Summary<double> expected = summarise(c, wide, wanted, row_mask, serial());
  CHECK(same_bits(expected, summarise(c, wide, wanted, row_mask, threads(3))), "float64 %s: depends on the threads",
        what.c_str());
  if (std::is_same_v<T, float>) check_against_weights(c, wide, expected, wanted, row_mask, "float64 " + what);
  on_every_own_isa<T>(c, [&](const char* isa) {
    const std::string label = std::string(Traits<T>::name) + " " + isa + " " + what;
    Summary<T> got = summarise(c, in, wanted, row_mask, threads(2));
    const double tolerance = kTolerance<T>;
    compare("entropy", label, got.entropy, expected.entropy, tolerance);
    compare("max_weight", label, got.max_weight, expected.max_weight, tolerance);
    compare("lse", label, got.lse, expected.lse, tolerance);
    if (wanted.statistics) {
      compare("row_max", label, got.row_max, expected.row_max, tolerance);
      compare("row_sum", label, got.row_sum, expected.row_sum, 4 * tolerance);
    }
    compare("key_mass", label, got.key_mass, expected.key_mass, tolerance);
    check_top(c, wide, got, expected, wanted.top_k, tolerance, label);
    for (const int count : {1, 3, 8}) {
      CHECK(same_bits(got, summarise(c, in, wanted, row_mask, threads(count))), "%s: depends on the threads, %d",
            label.c_str(), count);
    }
  });
}

struct WantedCase {
  Case c;
  Wanted wanted;
};

std::vector<WantedCase> make_cases(int random_cases, unsigned random_seed) {
  std::vector<WantedCase> cases = {
      {{}, {.top_k = 3}},
      {{.B = 1, .Hq = 1, .Hkv = 1, .Lq = 1, .Lk = 1, .D = 1}, {.top_k = 1}},
      {{.Lq = 0}, {.top_k = 2}},
      {{.Lk = 0, .sinks = true}, {.top_k = 2}},
      {{.B = 0}, {}},
      {{.Hq = 0, .Hkv = 2}, {}},
      {{.Lq = 130, .Lk = 131, .causal = Causal::kBottomRight}, {.top_k = 8}},
      {{.Lq = 150, .Lk = 100, .causal = Causal::kBottomRight}, {.top_k = 8, .rows = Wanted::kOwn}},
      {{.Lq = 63, .Lk = 127, .layout = Layout::kHeadsInRows, .causal = Causal::kTopLeft}, {.top_k = 5}},
      {{.Lq = 65, .Lk = 129, .D = 65, .layout = Layout::kPadded, .kv_layout = Layout::kPadded}, {.top_k = 7}},
      {{.Lq = 150, .Lk = 100, .left = 0, .right = 7, .kv_lengths = true}, {.top_k = 20}},
      {{.Hq = 8, .Lq = 1, .Lk = 1030, .D = 32, .kv_lengths = true}, {.top_k = 10, .statistics = false}},
      {{.B = 1, .Hq = 1, .Hkv = 1, .Lq = 300, .Lk = 5000, .D = 8}, {.top_k = 40, .rows = Wanted::kOwn}},
      {{.B = 1, .Hq = 1, .Hkv = 1, .Lq = 70, .Lk = 900}, {.top_k = kMaxTopK, .mass = false}},
      {{.B = 1, .Lq = 20, .Lk = 50}, {.top_k = kMaxTopK, .statistics = false}},
      {{.Lq = 100, .mask = kFullQ + kFullK, .sinks = true}, {.top_k = 4, .rows = Wanted::kSharedByHeads}},
      {{.Lq = 70, .Lk = 200, .bias = kFull, .bias_hides = true}, {.top_k = 9}},
      {{.Lq = 70, .Lk = 200, .bias = kFull, .bias_hides = true, .sinks = true}, {.top_k = 9}},
      {{.scale = -3.0, .softcap = 2.0}, {.top_k = 6}},
      {{.scale = 20.0}, {.top_k = 6}},
      {{.scale = 1e-6}, {.top_k = 6}},
  };
  Case everything = kEverything;
  everything.d_lse = false;
  everything.dropout_p = 0.0;
  cases.push_back({everything, {.top_k = 8, .rows = Wanted::kOwn}});
  std::mt19937 random(random_seed);
  for (int n = 0; n < random_cases; ++n) {
    Case c;
    c.B = pick(random, 1, 1, 2);
    c.Hkv = pick(random, 1, 1, 2, 3);
    c.Hq = c.Hkv * pick(random, 1, 1, 2, 4);
    c.D = pick(random, 1, 2, 3, 7, 8, 16, 17, 33, 64, 65, 128);
    c.Dv = 1;
    do {
      c.Lq = pick(random, 1, 2, 5, 15, 16, 17, 31, 63, 64, 65, 127, 129, 197);
      c.Lk = pick(random, 1, 2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 127, 129, 205, 515);
    } while (c.B * c.Hq * c.Lq * c.Lk * c.D > 2000000 && (c.Lq > 1 || c.Lk > 1));
    c.layout = pick(random, Layout::kContiguous, Layout::kHeadsInRows, Layout::kPadded, Layout::kBroadcast);
    c.kv_layout = pick(random, Layout::kContiguous, Layout::kHeadsInRows, Layout::kPadded, Layout::kBroadcast);
    c.causal = pick(random, Causal::kNone, Causal::kNone, Causal::kTopLeft, Causal::kBottomRight);
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
    Wanted wanted;
    wanted.top_k = pick(random, 0, 1, 2, 5, 8, 30);
    wanted.mass = chance(random, 0.8);
    wanted.rows = pick(random, Wanted::kAll, Wanted::kSharedByHeads, Wanted::kOwn);
    wanted.statistics = chance(random, 0.5);
    cases.push_back({c, wanted});
  }
  return cases;
}

// Keys in groups of equal scores: of equals, the lower key comes first, wherever the tiles end and whatever the order
// in which the groups come.
template <class T>
void check_ties() {
  const Case c{.B = 1, .Lq = 40, .Lk = 700, .D = 8, .Dv = 1, .causal = Causal::kBottomRight, .mask = kFullK};
  for (const int64_t top_k : {1, 7, 64}) {
    std::mt19937 random(5);
    Inputs<T> in = make_inputs<T>(c, random);
    in.k.for_each([&](int64_t b, int64_t h, int64_t j, int64_t d) {
      const int64_t group = j * 7 % 23 / 4;
      from_double(d == 0 ? static_cast<double>(group) * 0.5 : 0.0, &in.k.at(b, h, j, d));
    });
    in.q.for_each([&](int64_t b, int64_t h, int64_t i, int64_t d) { from_double(1.0, &in.q.at(b, h, i, d)); });
    Inputs<double> wide = to_float64(c, in);
    const Summary<double> expected = summarise(c, wide, {.top_k = top_k}, {}, serial());
    on_every_isa([&](const char* isa) {
      const Summary<T> got = summarise(c, in, {.top_k = top_k}, {}, threads(2));
      CHECK(got.top_index == expected.top_index, "%s %s top%d: ties in another order", Traits<T>::name, isa,
            int(top_k));
    });
  }
}

// Scores that grow with the key, so that each one is inserted; and that shrink.
void check_orders() {
  const Case c{.B = 1, .Hq = 1, .Hkv = 1, .Lq = 20, .Lk = 600, .D = 1, .Dv = 1, .scale = 0.01};
  for (const bool grows : {false, true}) {
    std::mt19937 random(5);
    Inputs<float> in = make_inputs<float>(c, random);
    for (int64_t j = 0; j < c.Lk; ++j) in.k.at(0, 0, j, 0) = static_cast<float>(grows ? j : c.Lk - j);
    for (int64_t i = 0; i < c.Lq; ++i) in.q.at(0, 0, i, 0) = 1.0f;
    Inputs<double> wide = to_float64(c, in);
    const int64_t top_k = 11;
    const auto check = [&](const std::vector<int64_t>& top_index, const char* label) {
      for (int64_t n = 0; n < c.Lq * top_k; ++n) {
        const int64_t t = n % top_k, expected = grows ? c.Lk - 1 - t : t;
        CHECK(top_index[static_cast<size_t>(n)] == expected, "%s: key %d, not %d", label,
              int(top_index[static_cast<size_t>(n)]), int(expected));
      }
    };
    check(summarise(c, wide, {.top_k = top_k}, {}, serial()).top_index, "float64");
    on_every_isa([&](const char* isa) { check(summarise(c, in, {.top_k = top_k}, {}, serial()).top_index, isa); });
  }
}

// A NaN in a row's query makes its results NaN, and nobody else's: of key_mass the keys that it sees, where it counts.
template <class T>
void check_not_finite() {
  const Case c{.B = 1, .Hq = 2, .Hkv = 2, .Lq = 70, .Lk = 100, .Dv = 1, .causal = Causal::kBottomRight};
  std::mt19937 random(9);
  Inputs<T> in = make_inputs<T>(c, random);
  Inputs<T> clean = in;
  for (const int64_t i : {5, 66}) from_double(kNaN, &in.q.at(0, 1, i, 2));
  std::vector<uint8_t> row_mask(static_cast<size_t>(c.Hq * c.Lq), 1);
  for (const int64_t i : {5, 66}) row_mask[static_cast<size_t>(c.Lq + i)] = 0;
  const Wanted wanted{.top_k = 4, .rows = Wanted::kOwn};
  on_every_isa([&](const char* isa) {
    Summary<T> got = summarise(c, in, wanted, row_mask, threads(2));
    Summary<T> expected = summarise(c, clean, wanted, row_mask, threads(2));
    CHECK(same_bits(got.key_mass, expected.key_mass), "%s %s: a row that does not count is in key_mass",
          Traits<T>::name, isa);
    for (int64_t h = 0; h < c.Hq; ++h) {
      for (int64_t i = 0; i < c.Lq; ++i) {
        const bool is_poisoned = h == 1 && (i == 5 || i == 66);
        const auto holds = [&](auto& tensor, auto& other) {
          const float x = tensor.at(0, h, i, 0), y = other.at(0, h, i, 0);
          return is_poisoned ? std::isnan(x) : x == y;
        };
        CHECK(holds(got.entropy, expected.entropy) && holds(got.max_weight, expected.max_weight) &&
                  holds(got.lse, expected.lse) && holds(got.top_weights, expected.top_weights),
              "%s %s [%d, %d]: %g %g %g %g", Traits<T>::name, isa, int(h), int(i), double(got.entropy.at(0, h, i, 0)),
              double(got.max_weight.at(0, h, i, 0)), double(got.lse.at(0, h, i, 0)),
              double(got.top_weights.at(0, h, i, 0)));
      }
    }
    const std::vector<uint8_t> all(row_mask.size(), 1);
    Summary<T> with_them = summarise(c, in, wanted, all, threads(2));
    // Row 66 sees the keys up to 96; what a NaN row does not see stays what it is, in tiles that the mask cuts too.
    Summary<T> all_clean = summarise(c, clean, wanted, all, threads(2));
    for (int64_t h = 0; h < c.Hq; ++h) {
      for (int64_t j = 0; j < c.Lk; ++j) {
        const float x = with_them.key_mass.at(0, h, j, 0), y = all_clean.key_mass.at(0, h, j, 0);
        CHECK(h == 1 && j <= 96 ? std::isnan(x) : x == y, "%s %s: key_mass[%d, %d] is %g, and %g without NaN rows",
              Traits<T>::name, isa, int(h), int(j), double(x), double(y));
      }
    }
  });
}

}  // namespace

// summary_test [number of random cases [seed]]
int main(int argc, char** argv) {
  const int random_cases = argc > 1 ? std::atoi(argv[1]) : 80;
  unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 777u;
  print_isas();
  for (const WantedCase& wc : make_cases(random_cases, seed)) {
    check_summary_of<float>(wc.c, wc.wanted, ++seed);
    check_summary_of<BFloat16>(wc.c, wc.wanted, seed);
    check_summary_of<Float16>(wc.c, wc.wanted, seed);
  }
  check_ties<float>();
  check_ties<BFloat16>();
  check_ties<Float16>();
  check_orders();
  check_not_finite<float>();
  check_not_finite<BFloat16>();
  return report("summary_test");
}
