// exp, tanh and Philox on vectors, for every instruction set alike.
#pragma once

#include "core/macros.h"
#include "core/philox.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

// 2^(f + n) for f in [-1/2, 1/2] and the integer n in the low bits of `shifted`. Minimax polynomials whose constant is
// exactly 1, so that the weight of a row's maximum is 1: degree 5 is good to 1 ulp; degree 3, to 1e-4, serves weights
// that are rounded to bfloat16 (4e-3).
template <int kDegree>
FASTATTN_FN Vf vexp2_parts(Vf f, Vf shifted) {
  static_assert(kDegree == 3 || kDegree == 5, "there are polynomials of degree 3 and 5");
  Vf y;
  if constexpr (kDegree == 3) {
    y = vset(0.055009059607982635f);
    y = vfma(y, f, vset(0.2422109693288803f));
    y = vfma(y, f, vset(0.6932829022407532f));
  } else {
    y = vset(0.0013202981790527701f);
    y = vfma(y, f, vset(0.009674952365458012f));
    y = vfma(y, f, vset(0.055510472506284714f));
    y = vfma(y, f, vset(0.24022166430950165f));
    y = vfma(y, f, vset(0.6931465864181519f));
  }
  y = vfma(y, f, vset(1.0f));
  return vadd_exponent(y, shifted);
}

// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. Rounding by addition and scaling by integer
// operations spare the multiply-add units, which the matrix products need.
constexpr float kRoundingShift = 12582912.0f;

// 2^t for t <= 127. From t = -127 on downwards it is exactly 0: masked weights must vanish. NaN stays NaN.
template <int kDegree>
FASTATTN_FN Vf vexp2(Vf t) {
  // At t = -127 the exponent leaves the bits of 1 minus as many, which is 0.
  t = vmax(vset(-127.0f), t);
  const Vf magic = vset(kRoundingShift);
  const Vf shifted = vadd(t, magic);
  return vexp2_parts<kDegree>(vsub(t, vsub(shifted, magic)), shifted);
}

FASTATTN_FN Vf vexp(Vf x) { return vexp2<5>(vmul(x, vset(kLog2e))); }

// e^x for |x| < 87 to an ulp or so, however large x is: vexp's error grows with x, by the rounding of x log2(e).
FASTATTN_FN Vf vexp_precise(Vf x) {
  // log(2) in two parts. The first has so few bits that its product with an integer below 128 is exact.
  constexpr float kLog2High = 0.693145751953125f, kLog2Low = 1.42860677e-6f;
  const Vf magic = vset(kRoundingShift);
  const Vf shifted = vfma(x, vset(kLog2e), magic);
  const Vf n = vsub(shifted, magic);
  const Vf rest = vnegative_fma(n, vset(kLog2Low), vnegative_fma(n, vset(kLog2High), x));
  return vexp2_parts<5>(vmul(rest, vset(kLog2e)), shifted);
}

// 1 / x of numbers whose reciprocal is normal: to about an ulp where kRefined, else to 14 bits or more, which
// serves bfloat16. Newton's step doubles the bits of an estimate; Halley's, one multiply-add more, triples them.
template <bool kRefined>
FASTATTN_FN Vf vreciprocal(Vf x) {
  const Vf y = vreciprocal_estimate(x);
  if constexpr (kReciprocalBits >= 24 || (!kRefined && kReciprocalBits >= 14)) return y;
  const Vf rest = vnegative_fma(x, y, vset(1.0f));
  if constexpr (kRefined && kReciprocalBits < 14) return vfma(y, vfma(rest, rest, rest), y);
  return vfma(y, rest, y);
}

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
