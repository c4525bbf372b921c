// The vector vocabulary in plain C++ with compiler vector extensions: four float lanes, no intrinsics.
//
// It runs on any x86-64 and is what other architectures compile. It also documents the vocabulary; each simd/<isa>.h
// defines the same names.
#pragma once

#include <math.h>
#include <string.h>

#include "core/macros.h"

// Whether there are dot products of 16-bit integers beside those of bfloat16 numbers (FASTATTN_BF16_DOT).
#define FASTATTN_I16_DOT 0

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kLanes = 4;         // floats in a vector
constexpr int kPanelVectors = 2;  // vectors of query rows (or of head dims) that a matrix kernel holds at a time

typedef float Vf __attribute__((vector_size(16), may_alias));
typedef uint32_t Vi __attribute__((vector_size(16), may_alias));
typedef int32_t Vm __attribute__((vector_size(16), may_alias));  // a mask: all ones or all zeros in each lane

FASTATTN_FN Vf vzero() { return Vf{}; }
FASTATTN_FN Vf vset(float x) { return Vf{x, x, x, x}; }
FASTATTN_FN Vf vload(const float* p) {
  Vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_FN void vstore(float* p, Vf x) { memcpy(p, &x, sizeof x); }
FASTATTN_FN Vf vadd(Vf a, Vf b) { return a + b; }
FASTATTN_FN Vf vsub(Vf a, Vf b) { return a - b; }
FASTATTN_FN Vf vmul(Vf a, Vf b) { return a * b; }
FASTATTN_FN Vf vdiv(Vf a, Vf b) { return a / b; }
FASTATTN_FN Vf vfma(Vf a, Vf b, Vf c) { return a * b + c; }  // fused where the processor can, else rounded twice
FASTATTN_FN Vf vnegative_fma(Vf a, Vf b, Vf c) { return c - a * b; }
// 1 / x to kReciprocalBits bits.
constexpr int kReciprocalBits = 24;
FASTATTN_FN Vf vreciprocal_estimate(Vf x) { return 1.0f / x; }

FASTATTN_FN Vf vselect(Vm m, Vf yes, Vf no) { return (Vf)((m & (Vm)yes) | (~m & (Vm)no)); }  // m ? yes : no
FASTATTN_FN Vi viselect(Vm m, Vi yes, Vi no) { return (Vi)((m & (Vm)yes) | (~m & (Vm)no)); }
FASTATTN_FN Vm vless(Vf a, Vf b) { return a < b; }
FASTATTN_FN Vm vequal(Vf a, Vf b) { return a == b; }
FASTATTN_FN bool vany(Vm m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
FASTATTN_FN Vm vmask_from_bits(uint64_t bits) {  // bit l of bits -> lane l
  const int32_t b = static_cast<int32_t>(bits);
  return (Vm{b, b, b, b} & Vm{1, 2, 4, 8}) != Vm{0, 0, 0, 0};
}

// If either is NaN, b: so max(constant, x) and max(x, running) keep a NaN that stands second.
FASTATTN_FN Vf vmax(Vf a, Vf b) { return vselect(a > b, a, b); }
FASTATTN_FN Vf vmin(Vf a, Vf b) { return vselect(a < b, a, b); }
FASTATTN_FN Vf vabs(Vf a) { return (Vf)((Vi)a & Vi{0x7FFFFFFFu, 0x7FFFFFFFu, 0x7FFFFFFFu, 0x7FFFFFFFu}); }

FASTATTN_FN Vi viset(uint32_t x) { return Vi{x, x, x, x}; }
FASTATTN_FN Vi viota() { return Vi{0, 1, 2, 3}; }  // lane numbers
FASTATTN_FN Vi viadd(Vi a, Vi b) { return a + b; }
FASTATTN_FN Vi visub(Vi a, Vi b) { return a - b; }
FASTATTN_FN Vi viand(Vi a, Vi b) { return a & b; }
FASTATTN_FN Vi vixor(Vi a, Vi b) { return a ^ b; }
FASTATTN_FN Vi vixor(Vi a, Vi b, Vi c) { return a ^ b ^ c; }
template <int kBits>
FASTATTN_FN Vi vishift_right(Vi a) {  // of signed numbers
  return (Vi)((Vm)a >> kBits);
}
FASTATTN_FN Vm viequal(Vi a, Vi b) { return (Vm)(a == b); }
FASTATTN_FN Vm vigreater_equal(Vi a, Vi b) { return (Vm)(a >= b); }  // unsigned
FASTATTN_FN Vf vfrom_int(Vi a) { return __builtin_convertvector((Vm)a, Vf); }
FASTATTN_FN Vi viload(const uint32_t* p) {
  Vi x;
  memcpy(&x, p, sizeof x);
  return x;
}
FASTATTN_FN void vistore(uint32_t* p, Vi x) { memcpy(p, &x, sizeof x); }
FASTATTN_FN Vf vbits_as_float(Vi a) { return (Vf)a; }
FASTATTN_FN Vi vbits_as_int(Vf a) { return (Vi)a; }

// y * 2^n for y near 1, where the low bits of `shifted` hold n.
FASTATTN_FN Vf vadd_exponent(Vf y, Vf shifted) { return (Vf)((Vi)y + ((Vi)shifted << 23)); }

FASTATTN_FN float vreduce_add(Vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
FASTATTN_FN float vreduce_max(Vf a) {
  const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
}

// Lanes in pairs, as 64-bit numbers, the even lane being the lower half: the product of even lanes, the upper halves
// (in even lanes, with zeros in the odd ones), and the lanes of even and odd ones that were computed apart.
FASTATTN_FN Vi vimul_even(Vi a, Vi b) {
  Vi product;
  for (int l = 0; l < kLanes; l += 2) {
    const uint64_t x = static_cast<uint64_t>(a[l]) * b[l];
    product[l] = static_cast<uint32_t>(x);
    product[l + 1] = static_cast<uint32_t>(x >> 32);
  }
  return product;
}
FASTATTN_FN Vi vihigh(Vi a) { return Vi{a[1], 0, a[3], 0}; }
FASTATTN_FN Vi vijoin(Vi even, Vi odd) { return Vi{even[0], odd[0], even[2], odd[2]}; }

// Bit t of the result: is p[t] nonzero, for t < 64.
FASTATTN_FN uint64_t nonzero_bytes(const uint8_t* p) {
  uint64_t bits = 0;
  for (int t = 0; t < 64; t += 8) {
    uint64_t bytes;
    memcpy(&bytes, p + t, sizeof bytes);
    // The top bit of each byte becomes "nonzero"; the product gathers the eight of them in the top byte.
    const uint64_t high = 0x8080808080808080u;
    const uint64_t flags = (((bytes & ~high) + ~high) | bytes) & high;
    bits |= (((flags >> 7) * 0x0102040810204080u) >> 56) << t;
  }
  return bits;
}

// The first n lanes (all, when n is larger); the rest is zero, and is not read or written in memory.
FASTATTN_FN Vf vload_first(const float* p, int64_t n) {
  if (n >= kLanes) return vload(p);
  Vf x = vzero();
  for (int64_t l = 0; l < n; ++l) x[l] = p[l];
  return x;
}
FASTATTN_FN void vstore_first(float* p, Vf x, int64_t n) {
  if (n >= kLanes) {
    vstore(p, x);
    return;
  }
  for (int64_t l = 0; l < n; ++l) p[l] = x[l];
}

// 16-bit numbers widened on load, and rounded to nearest even on store.
FASTATTN_FN float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FASTATTN_FN uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTATTN_FN float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
FASTATTN_FN uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
FASTATTN_FN float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (magnitude << 13));  // infinity, NaN
  // The bits, read as a float32 exponent and mantissa, are the number times 2^-112; subnormals come out right as well.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
FASTATTN_FN uint16_t float_to_f16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 leaves exactly those bits, rounded, in the mantissa.
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u));
  }
  const uint32_t rebiased = magnitude - 0x38000000u;
  return static_cast<uint16_t>(sign | ((rebiased + 0x0FFFu + ((rebiased >> 13) & 1u)) >> 13));
}
FASTATTN_FN Vf vload_bf16_first(const uint16_t* p, int64_t n) {
  Vf x = vzero();
  for (int64_t l = 0; l < kLanes && l < n; ++l) x[l] = bf16_to_float(p[l]);
  return x;
}
FASTATTN_FN Vf vload_bf16(const uint16_t* p) { return vload_bf16_first(p, kLanes); }
FASTATTN_FN Vf vload_f16_first(const uint16_t* p, int64_t n) {
  Vf x = vzero();
  for (int64_t l = 0; l < kLanes && l < n; ++l) x[l] = f16_to_float(p[l]);
  return x;
}
FASTATTN_FN Vf vload_f16(const uint16_t* p) { return vload_f16_first(p, kLanes); }
FASTATTN_FN void vstore_bf16_first(uint16_t* p, Vf x, int64_t n) {
  for (int64_t l = 0; l < kLanes && l < n; ++l) p[l] = float_to_bf16(x[l]);
}
FASTATTN_FN void vstore_bf16(uint16_t* p, Vf x) { vstore_bf16_first(p, x, kLanes); }
FASTATTN_FN void vstore_f16_first(uint16_t* p, Vf x, int64_t n) {
  for (int64_t l = 0; l < kLanes && l < n; ++l) p[l] = float_to_f16(x[l]);
}
FASTATTN_FN void vstore_f16(uint16_t* p, Vf x) { vstore_f16_first(p, x, kLanes); }

FASTATTN_FN Vf vload_i8_first(const int8_t* p, int64_t n) {
  Vf x = vzero();
  for (int64_t l = 0; l < kLanes && l < n; ++l) x[l] = static_cast<float>(p[l]);
  return x;
}
FASTATTN_FN Vf vload_i8(const int8_t* p) { return vload_i8_first(p, kLanes); }

// Lane i of the result: the sum over the lanes of x[i].
FASTATTN_FN Vf vadd_lanes(const Vf (&x)[kLanes]) {
  return Vf{vreduce_add(x[0]), vreduce_add(x[1]), vreduce_add(x[2]), vreduce_add(x[3])};
}

// r[i] lane j <-> r[j] lane i.
FASTATTN_FN void vtranspose(Vf (&r)[kLanes]) {
  Vf t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = Vf{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < kLanes; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
