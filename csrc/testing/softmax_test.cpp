// The online softmax (core/softmax.h) against the sum over all scores at once, and score modifiers (core/score.h)
// against difference quotients of their values.
#include "core/softmax.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "core/score.h"
#include "testing/check.h"

namespace {

using fastattn::SoftmaxState;

template <class Real>
constexpr Real kMinusInfinity = -std::numeric_limits<Real>::infinity();

template <class Real>
bool is_close(Real x, Real y, Real tolerance) {
  return x == y || std::abs(x - y) <= tolerance * std::max(Real(1), std::abs(y));
}

// All at once, in long double.
template <class Real>
SoftmaxState<Real> whole(const std::vector<Real>& scores, size_t begin, size_t end) {
  Real m = kMinusInfinity<Real>;
  for (size_t n = begin; n < end; ++n) m = std::max(m, scores[n]);
  long double l = 0.0L;
  for (size_t n = begin; n < end; ++n) {
    if (scores[n] != kMinusInfinity<Real>) l += std::exp(static_cast<long double>(scores[n]) - m);
  }
  return {m, static_cast<Real>(l)};
}

template <class Real>
void check_equal(const SoftmaxState<Real>& got, const SoftmaxState<Real>& expected, const char* what) {
  const Real tolerance = 32 * std::numeric_limits<Real>::epsilon();
  CHECK(got.m == expected.m && is_close(got.l, expected.l, tolerance), "%s: (%g, %g), not (%g, %g)", what,
        double(got.m), double(got.l), double(expected.m), double(expected.l));
}

template <class Real>
void check_merge() {
  const Real lowest = std::numeric_limits<Real>::lowest();
  const SoftmaxState<Real> empty{kMinusInfinity<Real>, Real(0)};
  const SoftmaxState<Real> both = softmax_merge(empty, empty);
  CHECK(both.m == empty.m && both.l == Real(0), "(%g, %g)", double(both.m), double(both.l));
  CHECK(softmax_lse(empty) == empty.m, "%g", double(softmax_lse(empty)));

  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  for (int round = 0; round < 300; ++round) {
    // Ordinary scores; some hidden; all close to the most negative number; far apart.
    std::vector<Real> scores(1 + round % 17);
    for (Real& score : scores) {
      score = static_cast<Real>(normal(random));
      if (round % 4 == 1 && random() % 2 == 0) score = kMinusInfinity<Real>;
      if (round % 4 == 2) score = lowest;
      if (round % 4 == 3) score *= Real(1e4);
    }
    const SoftmaxState<Real> expected = whole(scores, 0, scores.size());
    for (size_t cut = 0; cut <= scores.size(); ++cut) {
      const SoftmaxState<Real> a = whole(scores, 0, cut), b = whole(scores, cut, scores.size());
      check_equal(softmax_merge(a, b), expected, "merge");
      check_equal(softmax_merge(b, a), expected, "merge, swapped");
    }
    SoftmaxState<Real> one_by_one = empty;
    for (size_t n = 0; n < scores.size(); ++n) one_by_one = softmax_merge(one_by_one, whole(scores, n, n + 1));
    check_equal(one_by_one, expected, "one by one");
    if (expected.m > lowest) {
      const Real lse = expected.m + static_cast<Real>(std::log(static_cast<long double>(expected.l)));
      CHECK(is_close(softmax_lse(expected), lse, 8 * std::numeric_limits<Real>::epsilon()), "%g, not %g",
            double(softmax_lse(expected)), double(lse));
    }

    // A sink is one score more, except in a row that sees nothing.
    const Real sink = static_cast<Real>(3 * normal(random));
    std::vector<Real> with_sink = scores;
    with_sink.push_back(sink);
    const bool is_empty = expected.m == kMinusInfinity<Real>;
    check_equal(softmax_add_sink(expected, sink), is_empty ? expected : whole(with_sink, 0, with_sink.size()), "sink");
    check_equal(softmax_add_sink(expected, kMinusInfinity<Real>), expected, "sink of -inf");
  }
}

template <class Real>
void check_softcap() {
  const Real step = std::cbrt(std::numeric_limits<Real>::epsilon());
  for (const Real cap : {Real(0.5), Real(1), Real(30)}) {
    for (Real x = -3 * cap; x <= 3 * cap; x += cap / 16) {
      const auto value = [&](Real at) { return fastattn::softcap_value(std::tanh(at / cap), cap); };
      const Real slope = fastattn::softcap_derivative(std::tanh(x / cap));
      const Real quotient = (value(x + step * cap) - value(x - step * cap)) / (2 * step * cap);
      CHECK(is_close(slope, quotient, 4 * step * step), "cap %g at %g: %g, not %g", double(cap), double(x),
            double(slope), double(quotient));
      CHECK(std::abs(value(x)) <= cap && std::abs(value(x)) <= std::abs(x), "cap %g at %g", double(cap), double(x));
    }
    CHECK(fastattn::softcap_derivative(Real(0)) == Real(1), "at 0");
    CHECK(fastattn::softcap_derivative(Real(1)) == Real(0) && fastattn::softcap_derivative(Real(-1)) == Real(0),
          "where tanh has saturated");
  }
}

void check_alibi() {
  for (int64_t Lq = 1; Lq < 6; ++Lq) {
    for (int64_t Lk = 1; Lk < 6; ++Lk) {
      for (const fastattn::Causal causal : {fastattn::Causal::kNone, fastattn::Causal::kTopLeft}) {
        fastattn::AttentionParams p;
        p.Lq = Lq;
        p.Lk = Lk;
        p.causal = causal;
        const fastattn::MaskGeometry g = mask_geometry(p, 0);
        // The last row sits on the last key, and every step away costs one, to either side.
        CHECK(alibi_distance(g, Lq - 1, Lk - 1) == 0, "Lq=%d Lk=%d", int(Lq), int(Lk));
        for (int64_t i = 0; i < Lq; ++i) {
          for (int64_t j = 0; j < Lk; ++j) {
            const int64_t expected = std::abs((Lq - 1 - i) - (Lk - 1 - j));
            CHECK(alibi_distance(g, i, j) == expected, "Lq=%d Lk=%d i=%d j=%d: %d", int(Lq), int(Lk), int(i), int(j),
                  int(alibi_distance(g, i, j)));
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_merge<float>();
  check_merge<double>();
  check_softcap<float>();
  check_softcap<double>();
  check_alibi();
  return fastattn::testing::report("softmax_test");
}
