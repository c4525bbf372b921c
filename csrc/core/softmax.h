// Online softmax: the state (m, l) of a row, m = max of the scores seen, l = sum of exp(score - m), and its exact
// merge.
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.)
#pragma once

#include <math.h>

#include "core/macros.h"

namespace fastattn {

template <class Real>
struct SoftmaxState {
  Real m;  // -inf: nothing seen, then l = 0
  Real l;
};

// exp(m - base) where m = -inf weighs nothing, also against base = -inf, for which the difference would be NaN.
template <class Real>
FASTATTN_FN Real softmax_weight(Real m, Real base) {
  if (m == -Real(INFINITY)) return Real(0);
  if constexpr (sizeof(Real) == sizeof(float)) return expf(m - base);
  return static_cast<Real>(exp(static_cast<double>(m - base)));
}

template <class Real>
FASTATTN_FN SoftmaxState<Real> softmax_merge(SoftmaxState<Real> a, SoftmaxState<Real> b) {
  const Real m = a.m > b.m ? a.m : b.m;
  return {m, a.l * softmax_weight(a.m, m) + b.l * softmax_weight(b.m, m)};
}

// A sink is a score without a value. It joins only rows that see a key: a row that sees none stays empty.
template <class Real>
FASTATTN_FN SoftmaxState<Real> softmax_add_sink(SoftmaxState<Real> state, Real sink) {
  if (state.m == -Real(INFINITY)) return state;
  return softmax_merge(state, SoftmaxState<Real>{sink, Real(1)});
}

template <class Real>
FASTATTN_FN Real softmax_lse(SoftmaxState<Real> state) {
  if (state.m == -Real(INFINITY)) return state.m;
  if constexpr (sizeof(Real) == sizeof(float)) return state.m + logf(state.l);
  return state.m + static_cast<Real>(log(static_cast<double>(state.l)));
}

}  // namespace fastattn
