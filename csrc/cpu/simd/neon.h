// The vector vocabulary on NEON (64-bit ARM), and the bfloat16 dot product where FASTATTN_BF16_DOT says so.
//
// Included only by csrc/cpu/isa_neon*.cpp and the tests of the vocabulary, whose target region begins here.
// simd/baseline.h documents what each operation means. Memory is read and written by memcpy, which becomes the same
// instructions as vld1q and vst1q: kernels look at the same memory as floats, integers and halves, at addresses that
// need not be aligned.
#pragma once

#include <arm_neon.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "core/macros.h"

#define FASTATTN_I16_DOT 0

#if FASTATTN_BF16_DOT
FASTATTN_BEGIN_TARGET("arch=armv8.2-a+bf16")
#else
FASTATTN_BEGIN_TARGET("arch=armv8-a")
#endif

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kLanes = 4;
constexpr int kPanelVectors = 4;  // 32 registers: 6 x 4 accumulators, 4 operands, 1 broadcast

using Vf = float32x4_t;
using Vi = uint32x4_t;
using Vm = uint32x4_t;  // all ones or all zeros in each lane

template <class Vector>
FASTATTN_FN Vector load_vector(const void* p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}

FASTATTN_FN Vi vbits_as_int(Vf a) { return vreinterpretq_u32_f32(a); }
FASTATTN_FN Vf vbits_as_float(Vi a) { return vreinterpretq_f32_u32(a); }

FASTATTN_FN Vf vzero() { return vdupq_n_f32(0.0f); }
FASTATTN_FN Vf vset(float x) { return vdupq_n_f32(x); }
FASTATTN_FN Vf vload(const float* p) { return load_vector<Vf>(p); }
FASTATTN_FN void vstore(float* p, Vf x) { memcpy(p, &x, sizeof x); }
FASTATTN_FN Vf vadd(Vf a, Vf b) { return vaddq_f32(a, b); }
FASTATTN_FN Vf vsub(Vf a, Vf b) { return vsubq_f32(a, b); }
FASTATTN_FN Vf vmul(Vf a, Vf b) { return vmulq_f32(a, b); }
FASTATTN_FN Vf vdiv(Vf a, Vf b) { return vdivq_f32(a, b); }
FASTATTN_FN Vf vfma(Vf a, Vf b, Vf c) { return vfmaq_f32(c, a, b); }
FASTATTN_FN Vf vnegative_fma(Vf a, Vf b, Vf c) { return vfmsq_f32(c, a, b); }
constexpr int kReciprocalBits = 8;
FASTATTN_FN Vf vreciprocal_estimate(Vf x) { return vrecpeq_f32(x); }

FASTATTN_FN Vf vselect(Vm m, Vf yes, Vf no) { return vbslq_f32(m, yes, no); }
FASTATTN_FN Vi viselect(Vm m, Vi yes, Vi no) { return vbslq_u32(m, yes, no); }
FASTATTN_FN Vm vless(Vf a, Vf b) { return vcltq_f32(a, b); }
FASTATTN_FN Vm vequal(Vf a, Vf b) { return vceqq_f32(a, b); }
FASTATTN_FN bool vany(Vm m) { return vmaxvq_u32(m) != 0; }
FASTATTN_FN Vm vmask_from_bits(uint64_t bits) {
  const Vi lane_bit = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), lane_bit);
}

// Not vmaxq and vminq: those are NaN where only a is, whereas the vocabulary wants b then.
FASTATTN_FN Vf vmax(Vf a, Vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
FASTATTN_FN Vf vmin(Vf a, Vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
FASTATTN_FN Vf vabs(Vf a) { return vabsq_f32(a); }
FASTATTN_FN Vf vadd_exponent(Vf y, Vf shifted) {
  return vbits_as_float(vaddq_u32(vbits_as_int(y), vshlq_n_u32(vbits_as_int(shifted), 23)));
}
FASTATTN_FN float vreduce_add(Vf a) { return vaddvq_f32(a); }
FASTATTN_FN float vreduce_max(Vf a) { return vmaxvq_f32(a); }

FASTATTN_FN Vi viset(uint32_t x) { return vdupq_n_u32(x); }
FASTATTN_FN Vi viota() { return Vi{0, 1, 2, 3}; }
FASTATTN_FN Vi viadd(Vi a, Vi b) { return vaddq_u32(a, b); }
FASTATTN_FN Vi visub(Vi a, Vi b) { return vsubq_u32(a, b); }
FASTATTN_FN Vi viand(Vi a, Vi b) { return vandq_u32(a, b); }
FASTATTN_FN Vi vixor(Vi a, Vi b) { return veorq_u32(a, b); }
FASTATTN_FN Vi vixor(Vi a, Vi b, Vi c) { return vixor(vixor(a, b), c); }
template <int kBits>
FASTATTN_FN Vi vishift_right(Vi a) {
  return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), kBits));
}
FASTATTN_FN Vm viequal(Vi a, Vi b) { return vceqq_u32(a, b); }
FASTATTN_FN Vm vigreater_equal(Vi a, Vi b) { return vcgeq_u32(a, b); }
FASTATTN_FN Vf vfrom_int(Vi a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
FASTATTN_FN Vi viload(const uint32_t* p) { return load_vector<Vi>(p); }
FASTATTN_FN void vistore(uint32_t* p, Vi x) { memcpy(p, &x, sizeof x); }

FASTATTN_FN uint32x2_t even_lanes(Vi a) { return vmovn_u64(vreinterpretq_u64_u32(a)); }
FASTATTN_FN Vi vimul_even(Vi a, Vi b) { return vreinterpretq_u32_u64(vmull_u32(even_lanes(a), even_lanes(b))); }
FASTATTN_FN Vi vihigh(Vi a) { return vreinterpretq_u32_u64(vshrq_n_u64(vreinterpretq_u64_u32(a), 32)); }
FASTATTN_FN Vi vijoin(Vi even, Vi odd) { return vtrn1q_u32(even, odd); }

// A bit of each byte, and four rounds of additions that bring the bits of eight bytes together.
FASTATTN_FN uint64_t nonzero_bytes(const uint8_t* p) {
  const uint8x16_t byte_bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t bits[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t x = load_vector<uint8x16_t>(p + 16 * i);
    bits[i] = vandq_u8(vtstq_u8(x, x), byte_bit);
  }
  const uint8x16_t quarters = vpaddq_u8(vpaddq_u8(bits[0], bits[1]), vpaddq_u8(bits[2], bits[3]));
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(quarters, quarters)), 0);
}

FASTATTN_FN Vf vload_first(const float* p, int64_t n) {
  if (n >= kLanes) return vload(p);
  Vf x = vzero();
  if (n > 0) x = vsetq_lane_f32(p[0], x, 0);
  if (n > 1) x = vsetq_lane_f32(p[1], x, 1);
  if (n > 2) x = vsetq_lane_f32(p[2], x, 2);
  return x;
}
FASTATTN_FN void vstore_first(float* p, Vf x, int64_t n) {
  if (n >= kLanes) {
    vstore(p, x);
    return;
  }
  if (n > 0) p[0] = vgetq_lane_f32(x, 0);
  if (n > 1) p[1] = vgetq_lane_f32(x, 1);
  if (n > 2) p[2] = vgetq_lane_f32(x, 2);
}

FASTATTN_FN uint16x4_t load_16(const uint16_t* p) { return load_vector<uint16x4_t>(p); }
FASTATTN_FN uint16x4_t load_first_16(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return load_16(p);
  uint16x4_t x = vdup_n_u16(0);
  if (n > 0) x = vset_lane_u16(p[0], x, 0);
  if (n > 1) x = vset_lane_u16(p[1], x, 1);
  if (n > 2) x = vset_lane_u16(p[2], x, 2);
  return x;
}
FASTATTN_FN void store_16(uint16_t* p, uint16x4_t x) { memcpy(p, &x, sizeof x); }
FASTATTN_FN void store_first_16(uint16_t* p, uint16x4_t x, int64_t n) {
  if (n >= kLanes) {
    store_16(p, x);
    return;
  }
  if (n > 0) p[0] = vget_lane_u16(x, 0);
  if (n > 1) p[1] = vget_lane_u16(x, 1);
  if (n > 2) p[2] = vget_lane_u16(x, 2);
}

FASTATTN_FN Vf widen_bf16(uint16x4_t h) { return vbits_as_float(vshll_n_u16(h, 16)); }
FASTATTN_FN Vf vload_bf16(const uint16_t* p) { return widen_bf16(load_16(p)); }
FASTATTN_FN Vf vload_bf16_first(const uint16_t* p, int64_t n) { return widen_bf16(load_first_16(p, n)); }
FASTATTN_FN Vf widen_f16(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
FASTATTN_FN Vf vload_f16(const uint16_t* p) { return widen_f16(load_16(p)); }
FASTATTN_FN Vf vload_f16_first(const uint16_t* p, int64_t n) { return widen_f16(load_first_16(p, n)); }

// Round to nearest even; NaN stays NaN (the addition could carry a NaN's payload into infinity).
FASTATTN_FN uint16x4_t narrow_bf16(Vf x) {
  const Vi bits = vbits_as_int(x);
  const Vi odd = vandq_u32(vshrq_n_u32(bits, 16), viset(1));
  const Vi rounded = vaddq_u32(bits, vaddq_u32(odd, viset(0x7FFF)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, viset(0x7FC00000u)), 16);
}
FASTATTN_FN void vstore_bf16(uint16_t* p, Vf x) { store_16(p, narrow_bf16(x)); }
FASTATTN_FN void vstore_bf16_first(uint16_t* p, Vf x, int64_t n) { store_first_16(p, narrow_bf16(x), n); }
FASTATTN_FN uint16x4_t narrow_f16(Vf x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
FASTATTN_FN void vstore_f16(uint16_t* p, Vf x) { store_16(p, narrow_f16(x)); }
FASTATTN_FN void vstore_f16_first(uint16_t* p, Vf x, int64_t n) { store_first_16(p, narrow_f16(x), n); }

// The first four of eight bytes.
FASTATTN_FN Vf widen_i8(int8x8_t x) { return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(x)))); }
FASTATTN_FN Vf vload_i8(const int8_t* p) { return widen_i8(vreinterpret_s8_u32(vdup_n_u32(load_vector<uint32_t>(p)))); }
FASTATTN_FN Vf vload_i8_first(const int8_t* p, int64_t n) {
  if (n >= kLanes) return vload_i8(p);
  int8x8_t x = vdup_n_s8(0);
  if (n > 0) x = vset_lane_s8(p[0], x, 0);
  if (n > 1) x = vset_lane_s8(p[1], x, 1);
  if (n > 2) x = vset_lane_s8(p[2], x, 2);
  return widen_i8(x);
}

FASTATTN_FN Vf vadd_lanes(const Vf (&x)[kLanes]) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }

// Two rounds that swap blocks of 1 and 2 lanes.
FASTATTN_FN void vtranspose(Vf (&r)[kLanes]) {
  const float64x2_t t0 = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
  const float64x2_t t1 = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
  const float64x2_t t2 = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
  const float64x2_t t3 = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
  r[0] = vreinterpretq_f32_f64(vtrn1q_f64(t0, t2));
  r[1] = vreinterpretq_f32_f64(vtrn1q_f64(t1, t3));
  r[2] = vreinterpretq_f32_f64(vtrn2q_f64(t0, t2));
  r[3] = vreinterpretq_f32_f64(vtrn2q_f64(t1, t3));
}

#if FASTATTN_BF16_DOT
// Two bfloat16 numbers in one 32-bit unit: acc + a.low * b.low + a.high * b.high.
FASTATTN_FN Vf vdot_bf16(Vf acc, Vi a, Vi b) {
  return vbfdotq_f32(acc, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}

// Two vectors rounded to bfloat16: `low` in the lower half of the register, `high` in the upper one.
FASTATTN_FN Vi vnarrow(Vf low, Vf high) {
  return vreinterpretq_u32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
}
FASTATTN_FN void vstore_low_half(uint16_t* p, Vi x) { store_16(p, vget_low_u16(vreinterpretq_u16_u32(x))); }
FASTATTN_FN void vstore_high_half(uint16_t* p, Vi x) { store_16(p, vget_high_u16(vreinterpretq_u16_u32(x))); }

// Lane i of the result holds number i of the lower half and number i of the upper half.
FASTATTN_FN Vi vinterleave_halves(Vi x) {
  const uint16x8_t halves = vreinterpretq_u16_u32(x);
  return vreinterpretq_u32_u16(vzip1q_u16(halves, vextq_u16(halves, halves, 4)));
}
// Lanes i of the two results hold (low[i], high[i]), for 2 * kLanes numbers of two rows.
FASTATTN_FN void vinterleave_rows(Vi low, Vi high, Vi* first, Vi* second) {
  const uint16x8_t a = vreinterpretq_u16_u32(low), b = vreinterpretq_u16_u32(high);
  *first = vreinterpretq_u32_u16(vzip1q_u16(a, b));
  *second = vreinterpretq_u32_u16(vzip2q_u16(a, b));
}

// The first n (at most 2 * kLanes) bfloat16 numbers of a row as 32-bit pairs, zero beyond.
FASTATTN_FN Vi vload_pairs_first(const uint16_t* p, int64_t n) {
  if (n >= 2 * kLanes) return load_vector<Vi>(p);
  uint16_t numbers[2 * kLanes] = {};
  for (int64_t i = 0; i < n; ++i) numbers[i] = p[i];
  return load_vector<Vi>(numbers);
}
#endif

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
