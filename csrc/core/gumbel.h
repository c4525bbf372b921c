// Gumbel noise for hard attention, from the same counter-based generator as dropout (core/philox.h): the word of
// (seed, offset, b, h, i, j) becomes a uniform number u = (word + 1/2) / 2^32, never 0 and never 1, and
//
//   g = -log(e)        e = -log(u), exponentially distributed
//
// Since exp(s + g) = exp(s) / e, the largest s_j + g_j is the largest exp(s_j - m) / e_j, which needs neither a second
// logarithm nor the row's final maximum. (Gumbel, 1954; Maddison, Tarlow and Minka, "A* sampling", 2014, section 2.)
#pragma once

#include <math.h>

#include "core/macros.h"

namespace fastattn {

// e of a word. Near u = 1, where log(u) loses its digits, by log1p of what is missing.
template <class Real>
FASTATTN_FN Real exponential_variate(uint32_t word) {
  constexpr double kUnit = 1.0 / 4294967296.0;
  if constexpr (sizeof(Real) == sizeof(double)) {
    return word >> 31 ? -log1p(-((4294967295.0 - word) + 0.5) * kUnit) : -log((word + 0.5) * kUnit);
  } else {
    const float missing = (static_cast<float>(4294967295u - word) + 0.5f) * static_cast<float>(kUnit);
    const float u = (static_cast<float>(word) + 0.5f) * static_cast<float>(kUnit);
    return word >> 31 ? -log1pf(-missing) : -logf(u);
  }
}

}  // namespace fastattn
