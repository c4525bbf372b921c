// The vector vocabulary on AVX2 with FMA and F16C.
//
// Included only by csrc/cpu/isa_avx2.cpp and the tests of the vocabulary, whose target region begins here.
// simd/baseline.h documents what each operation means.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "core/macros.h"

#define FASTATTN_I16_DOT 0

FASTATTN_BEGIN_TARGET("avx2,fma,f16c")

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kLanes = 8;
constexpr int kPanelVectors = 2;  // 16 registers: 6 x 2 accumulators, 2 operands, 1 broadcast

using Vf = __m256;
using Vi = __m256i;
using Vm = __m256;  // all ones or all zeros in each lane

FASTATTN_FN Vf vzero() { return _mm256_setzero_ps(); }
FASTATTN_FN Vf vset(float x) { return _mm256_set1_ps(x); }
FASTATTN_FN Vf vload(const float* p) { return _mm256_loadu_ps(p); }
FASTATTN_FN void vstore(float* p, Vf x) { _mm256_storeu_ps(p, x); }
FASTATTN_FN Vf vadd(Vf a, Vf b) { return _mm256_add_ps(a, b); }
FASTATTN_FN Vf vsub(Vf a, Vf b) { return _mm256_sub_ps(a, b); }
FASTATTN_FN Vf vmul(Vf a, Vf b) { return _mm256_mul_ps(a, b); }
FASTATTN_FN Vf vdiv(Vf a, Vf b) { return _mm256_div_ps(a, b); }
FASTATTN_FN Vf vfma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
FASTATTN_FN Vf vnegative_fma(Vf a, Vf b, Vf c) { return _mm256_fnmadd_ps(a, b, c); }
constexpr int kReciprocalBits = 11;
FASTATTN_FN Vf vreciprocal_estimate(Vf x) { return _mm256_rcp_ps(x); }
FASTATTN_FN Vf vmax(Vf a, Vf b) { return _mm256_max_ps(a, b); }
FASTATTN_FN Vf vmin(Vf a, Vf b) { return _mm256_min_ps(a, b); }
FASTATTN_FN Vf vabs(Vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FASTATTN_FN Vf vadd_exponent(Vf y, Vf shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), n));
}
FASTATTN_FN float vreduce_add(Vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FASTATTN_FN float vreduce_max(Vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

FASTATTN_FN Vm vless(Vf a, Vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
FASTATTN_FN Vm vequal(Vf a, Vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
FASTATTN_FN bool vany(Vm m) { return _mm256_movemask_ps(m) != 0; }
FASTATTN_FN Vm vmask_from_bits(uint64_t bits) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xFF)), lane_bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane_bit));
}
FASTATTN_FN Vf vselect(Vm m, Vf yes, Vf no) { return _mm256_blendv_ps(no, yes, m); }
FASTATTN_FN Vi viselect(Vm m, Vi yes, Vi no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }

FASTATTN_FN Vi viset(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
FASTATTN_FN Vi viota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FASTATTN_FN Vi viadd(Vi a, Vi b) { return _mm256_add_epi32(a, b); }
FASTATTN_FN Vi visub(Vi a, Vi b) { return _mm256_sub_epi32(a, b); }
FASTATTN_FN Vi viand(Vi a, Vi b) { return _mm256_and_si256(a, b); }
FASTATTN_FN Vi vixor(Vi a, Vi b) { return _mm256_xor_si256(a, b); }
FASTATTN_FN Vi vixor(Vi a, Vi b, Vi c) { return vixor(vixor(a, b), c); }
template <int kBits>
FASTATTN_FN Vi vishift_right(Vi a) {
  return _mm256_srai_epi32(a, kBits);
}
FASTATTN_FN Vm viequal(Vi a, Vi b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
FASTATTN_FN Vm vigreater_equal(Vi a, Vi b) {
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a));
}
FASTATTN_FN Vf vfrom_int(Vi a) { return _mm256_cvtepi32_ps(a); }
FASTATTN_FN Vi viload(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
FASTATTN_FN void vistore(uint32_t* p, Vi x) { _mm256_storeu_si256((__m256i*)p, x); }
FASTATTN_FN Vf vbits_as_float(Vi a) { return _mm256_castsi256_ps(a); }
FASTATTN_FN Vi vbits_as_int(Vf a) { return _mm256_castps_si256(a); }

FASTATTN_FN Vi vimul_even(Vi a, Vi b) { return _mm256_mul_epu32(a, b); }
FASTATTN_FN Vi vihigh(Vi a) { return _mm256_srli_epi64(a, 32); }
FASTATTN_FN Vi vijoin(Vi even, Vi odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

FASTATTN_FN uint64_t nonzero_bytes(const uint8_t* p) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)p), zero);
  const __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)(p + 32)), zero);
  const uint64_t zeros = static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
                         static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
  return ~zeros;
}

FASTATTN_FN __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : static_cast<int>(n)), viota());
}

FASTATTN_FN Vf vload_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
FASTATTN_FN void vstore_first(float* p, Vf x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }

// There is no masked load of 16-bit numbers: the first n go through the stack.
FASTATTN_FN __m128i load_first_16(const uint16_t* p, int64_t n) {
  if (n >= 8) return _mm_loadu_si128((const __m128i*)p);
  alignas(16) uint16_t buffer[8] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return _mm_load_si128((const __m128i*)buffer);
}
FASTATTN_FN void store_first_16(uint16_t* p, __m128i x, int64_t n) {
  if (n >= 8) {
    _mm_storeu_si128((__m128i*)p, x);
    return;
  }
  alignas(16) uint16_t buffer[8];
  _mm_store_si128((__m128i*)buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

FASTATTN_FN Vf widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
FASTATTN_FN Vf vload_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
FASTATTN_FN Vf vload_bf16_first(const uint16_t* p, int64_t n) { return widen_bf16(load_first_16(p, n)); }
FASTATTN_FN Vf vload_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FASTATTN_FN Vf vload_f16_first(const uint16_t* p, int64_t n) { return _mm256_cvtph_ps(load_first_16(p, n)); }

// Round to nearest even; NaN stays NaN (the addition could carry a NaN's payload into infinity).
FASTATTN_FN __m128i narrow_bf16(Vf x) {
  const Vi bits = _mm256_castps_si256(x);
  const Vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Vi rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(viset(0x7FC00000u)), nan);
  const Vi high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FASTATTN_FN void vstore_bf16(uint16_t* p, Vf x) { _mm_storeu_si128((__m128i*)p, narrow_bf16(x)); }
FASTATTN_FN void vstore_bf16_first(uint16_t* p, Vf x, int64_t n) { store_first_16(p, narrow_bf16(x), n); }
FASTATTN_FN __m128i narrow_f16(Vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTATTN_FN void vstore_f16(uint16_t* p, Vf x) { _mm_storeu_si128((__m128i*)p, narrow_f16(x)); }
FASTATTN_FN void vstore_f16_first(uint16_t* p, Vf x, int64_t n) { store_first_16(p, narrow_f16(x), n); }

FASTATTN_FN Vf vload_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
FASTATTN_FN Vf vload_i8_first(const int8_t* p, int64_t n) {
  if (n >= 8) return vload_i8(p);
  int8_t buffer[8] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return vload_i8(buffer);
}

FASTATTN_FN Vf vadd_lanes(const Vf (&x)[kLanes]) {
  const Vf low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const Vf high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return vadd(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

FASTATTN_FN void vtranspose(Vf (&r)[kLanes]) {
  Vf t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
    t[j + 4] = _mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) r[j] = t[j];
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
