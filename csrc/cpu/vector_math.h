// exp, tanh and Philox on vectors, for every instruction set alike.
#pragma once

#include "core/macros.h"
#include "core/philox.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

// 2^t for t <= 127. At -inf and wherever 2^t leaves float32's range it is exactly 0: masked weights must vanish, since
// what they multiply may be anything. NaN stays NaN. Degree 5 is good to 1 ulp; degree 3, to 7.5e-5, serves weights
// that are rounded to bfloat16 (4e-3). Minimax polynomials on [-1/2, 1/2]; the constant of degree 5 is exactly 1, so
// that equal scores get equal weights.
template <int kDegree>
FASTATTN_FN Vf vexp2(Vf t) {
  static_assert(kDegree == 3 || kDegree == 5, "there are polynomials of degree 3 and 5");
  // AVX-512 scales by any power of two and underflows to 0; elsewhere 2^-127 is taken to be 0.
  t = vmax(vset(kLanes == 16 ? -200.0f : -127.0f), t);
  const Vf n = vround(t);
  const Vf f = vsub(t, n);
  Vf y;
  if constexpr (kDegree == 3) {
    y = vset(0.0551716685295105f);
    y = vfma(y, f, vset(0.2426111251115799f));
    y = vfma(y, f, vset(0.6932609677314758f));
    y = vfma(y, f, vset(0.9999280571937561f));
  } else {
    y = vset(0.0013276472454890609f);
    y = vfma(y, f, vset(0.009675540961325169f));
    y = vfma(y, f, vset(0.05550713092088699f));
    y = vfma(y, f, vset(0.24022120237350464f));
    y = vfma(y, f, vset(0.6931469440460205f));
    y = vfma(y, f, vset(1.0f));
  }
  return vscale_exp2(y, n);
}

FASTATTN_FN Vf vexp(Vf x) { return vexp2<5>(vmul(x, vset(kLog2e))); }

// tanh by an odd polynomial near 0, where 1 - 2 / (1 + e^2x) would cancel, and by that formula elsewhere.
FASTATTN_FN Vf vtanh(Vf x) {
  const Vf magnitude = vabs(x);
  const Vf z = vmul(x, x);
  Vf small = vset(-5.70498872745e-3f);
  small = vfma(small, z, vset(2.06390887954e-2f));
  small = vfma(small, z, vset(-5.37397155531e-2f));
  small = vfma(small, z, vset(1.33314422036e-1f));
  small = vfma(small, z, vset(-3.33332819422e-1f));
  small = vfma(vmul(small, z), x, x);
  // Beyond 10 tanh is 1 in float32. vmin keeps a NaN that stands second.
  const Vf e = vexp(vmul(vset(2.0f), vmin(vset(10.0f), magnitude)));
  const Vf large = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  const Vf signed_large = vselect(vless(x, vzero()), vsub(vzero(), large), large);
  return vselect(vless(magnitude, vset(0.625f)), small, signed_large);
}

// The four words of Philox4x32-10 (core/philox.h) for one counter c0 and a vector of counters c1.
FASTATTN_FN void vphilox(uint64_t seed, uint32_t c0, Vi c1, uint32_t c2, uint32_t c3, Vi (&words)[4]) {
  Vi x0 = viset(c0), x1 = c1, x2 = viset(c2), x3 = viset(c3);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Vi high0, low0, high1, low1;
    vimul_wide(x0, viset(kPhiloxMul0), &high0, &low0);
    vimul_wide(x2, viset(kPhiloxMul1), &high1, &low1);
    x0 = vixor(vixor(high1, x1), viset(k0));
    x2 = vixor(vixor(high0, x3), viset(k1));
    x1 = low1;
    x3 = low0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = x0;
  words[1] = x1;
  words[2] = x2;
  words[3] = x3;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
