// exp, tanh, Philox and what is drawn with it, on vectors, for every instruction set alike.
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

// The four words of Philox4x32-10 (core/philox.h) for one counter c0 and a vector of counters c1, computed in even and
// odd lanes apart: 32-bit lanes hold half of a 64-bit product. Bits above a number of 32 bits are garbage, which
// multiplication ignores. With c0, c2 and c3 the same in all lanes, one round and a half are scalar.
FASTATTN_FN void vphilox(uint64_t seed, uint32_t c0, Vi c1, uint32_t c2, uint32_t c3, Vi (&words)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  // Round 1: both products are scalar.
  uint64_t product0 = static_cast<uint64_t>(kPhiloxMul0) * c0, product1 = static_cast<uint64_t>(kPhiloxMul1) * c2;
  const uint32_t mixed = static_cast<uint32_t>(product1 >> 32) ^ k0;
  const uint32_t n2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
  const uint32_t n1 = static_cast<uint32_t>(product1), n3 = static_cast<uint32_t>(product0);
  // Round 2: that of n2.
  k0 += kPhiloxWeyl0;
  k1 += kPhiloxWeyl1;
  product1 = static_cast<uint64_t>(kPhiloxMul1) * n2;
  const uint32_t m0 = static_cast<uint32_t>(product1 >> 32) ^ n1 ^ k0, m1 = static_cast<uint32_t>(product1);
  const Vi n3_k1 = viset(n3 ^ k1);
  // Round 3: that of m0.
  k0 += kPhiloxWeyl0;
  k1 += kPhiloxWeyl1;
  product0 = static_cast<uint64_t>(kPhiloxMul0) * m0;
  const Vi m1_k0 = viset(m1 ^ k0), high_k1 = viset(static_cast<uint32_t>(product0 >> 32) ^ k1);
  const Vi mul0 = viset(kPhiloxMul0), mul1 = viset(kPhiloxMul1);

  Vi x0[2], x1[2], x2[2], x3[2];
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    const Vi n0 = vixor(odd ? vihigh(c1) : c1, viset(mixed));
    const Vi from_n0 = vimul_even(n0, mul0);
    const Vi m2 = vixor(vihigh(from_n0), n3_k1);
    const Vi from_m2 = vimul_even(m2, mul1);
    x0[odd] = vixor(vihigh(from_m2), m1_k0);
    x1[odd] = from_m2;
    x2[odd] = vixor(from_n0, high_k1);
    x3[odd] = viset(static_cast<uint32_t>(product0));
  }
  for (int round = 3; round < kPhiloxRounds; ++round) {
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const Vi from_x0 = vimul_even(x0[odd], mul0), from_x2 = vimul_even(x2[odd], mul1);
      x0[odd] = vixor(vihigh(from_x2), x1[odd], viset(k0));
      x2[odd] = vixor(vihigh(from_x0), x3[odd], viset(k1));
      x1[odd] = from_x2;
      x3[odd] = from_x0;
    }
  }
  words[0] = vijoin(x0[0], x0[1]);
  words[1] = vijoin(x1[0], x1[1]);
  words[2] = vijoin(x2[0], x2[1]);
  words[3] = vijoin(x3[0], x3[1]);
}

// -log(u) of the uniform number of a word of Philox (core/gumbel.h), to about an ulp. With y = u, or 1 - u where that
// is less:
//
//   log(u) = n log(2) + log(1 + f)        f + 1 the number in [sqrt(1/2), sqrt(2)) that u is a power of two away from
//
// Where n is 0, f = -y, with all the digits that u = 1 - y has lost. Minimax polynomial for log(1 + f) = f + f^2 h(f),
// to 3e-8.
FASTATTN_FN Vf vexponential(Vi word) {
  const Vi sign = vishift_right<31>(word);
  const Vm is_high = viequal(sign, viset(0xFFFFFFFFu));
  const Vf y = vfma(vfrom_int(vixor(word, sign)), vset(0x1p-32f), vset(0x1p-33f));
  const Vf u = vselect(is_high, vsub(vset(1.0f), y), y);
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  const Vi offset = visub(vbits_as_int(u), viset(kSqrtHalf));
  const Vi n = vishift_right<23>(offset);
  const Vf reduced = vbits_as_float(viadd(viand(offset, viset(0x007FFFFFu)), viset(kSqrtHalf)));
  const Vf f = vselect(viequal(n, viset(0)), vsub(vzero(), y), vsub(reduced, vset(1.0f)));
  Vf h = vset(0.08760284632444382f);
  h = vfma(h, f, vset(-0.14323894679546356f));
  h = vfma(h, f, vset(0.14916829764842987f));
  h = vfma(h, f, vset(-0.1656842976808548f));
  h = vfma(h, f, vset(0.19961965084075928f));
  h = vfma(h, f, vset(-0.25001826882362366f));
  h = vfma(h, f, vset(0.33333954215049744f));
  h = vfma(h, f, vset(-0.49999991059303284f));
  const Vf log_1p = vfma(vmul(f, f), h, f);
  return vsub(vmul(vfrom_int(n), vset(-0.69314718055994530942f)), log_1p);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
