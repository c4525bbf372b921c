// Score modifiers, each with its derivative beside its value. They act in this order: scale, softcap, bias, ALiBi,
// mask.
#pragma once

#include "core/macros.h"
#include "core/mask.h"

namespace fastattn {

// softcap(x) = cap * t with t = tanh(x / cap), and d softcap / dx = 1 - t * t. The caller supplies tanh for its type.
template <class Real>
FASTATTN_FN Real softcap_value(Real t, Real cap) {
  return cap * t;
}
template <class Real>
FASTATTN_FN Real softcap_derivative(Real t) {
  return Real(1) - t * t;
}

// ALiBi subtracts slope * alibi_distance. It counts from the bottom-right diagonal whatever the causal alignment, and
// slopes are constants: nothing flows back through it.
FASTATTN_FN int64_t alibi_distance(const MaskGeometry& g, int64_t i, int64_t j) {
  const int64_t distance = i + g.Lk - g.Lq - j;
  return distance < 0 ? -distance : distance;
}

}  // namespace fastattn
