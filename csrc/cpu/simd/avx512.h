// The vector vocabulary on AVX-512 (F, BW, DQ, VL), and where FASTATTN_BF16_DOT says so the dot products of bfloat16
// numbers and of 16-bit integers (BF16, VNNI).
//
// Included only by csrc/cpu/isa_avx512*.cpp and the tests of the vocabulary, whose target region begins here.
// simd/baseline.h documents what each operation means.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "core/macros.h"

FASTATTN_BEGIN_INTRINSICS
#include <immintrin.h>
FASTATTN_END_INTRINSICS

#if FASTATTN_BF16_DOT
#define FASTATTN_I16_DOT 1
FASTATTN_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")
#else
#define FASTATTN_I16_DOT 0
FASTATTN_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;  // 32 registers: 6 x 4 accumulators, 4 operands, 1 broadcast

using Vf = __m512;
using Vi = __m512i;
using Vm = __mmask16;

FASTATTN_FN Vf vzero() { return _mm512_setzero_ps(); }
FASTATTN_FN Vf vset(float x) { return _mm512_set1_ps(x); }
FASTATTN_FN Vf vload(const float* p) { return _mm512_loadu_ps(p); }
FASTATTN_FN void vstore(float* p, Vf x) { _mm512_storeu_ps(p, x); }
FASTATTN_FN Vf vadd(Vf a, Vf b) { return _mm512_add_ps(a, b); }
FASTATTN_FN Vf vsub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
FASTATTN_FN Vf vmul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
FASTATTN_FN Vf vdiv(Vf a, Vf b) { return _mm512_div_ps(a, b); }
FASTATTN_FN Vf vfma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTATTN_FN Vf vnegative_fma(Vf a, Vf b, Vf c) { return _mm512_fnmadd_ps(a, b, c); }
constexpr int kReciprocalBits = 14;
FASTATTN_FN Vf vreciprocal_estimate(Vf x) { return _mm512_rcp14_ps(x); }
FASTATTN_FN Vf vmax(Vf a, Vf b) { return _mm512_max_ps(a, b); }
FASTATTN_FN Vf vmin(Vf a, Vf b) { return _mm512_min_ps(a, b); }
FASTATTN_FN Vf vabs(Vf a) { return _mm512_abs_ps(a); }
FASTATTN_FN Vf vadd_exponent(Vf y, Vf shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), n));
}
FASTATTN_FN float vreduce_add(Vf a) { return _mm512_reduce_add_ps(a); }
FASTATTN_FN float vreduce_max(Vf a) { return _mm512_reduce_max_ps(a); }

FASTATTN_FN Vm vless(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FASTATTN_FN Vm vequal(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FASTATTN_FN bool vany(Vm m) { return m != 0; }
FASTATTN_FN Vm vmask_from_bits(uint64_t bits) { return static_cast<Vm>(bits); }
FASTATTN_FN Vf vselect(Vm m, Vf yes, Vf no) { return _mm512_mask_blend_ps(m, no, yes); }
FASTATTN_FN Vi viselect(Vm m, Vi yes, Vi no) { return _mm512_mask_blend_epi32(m, no, yes); }

FASTATTN_FN Vi viset(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
FASTATTN_FN Vi viota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
FASTATTN_FN Vi viadd(Vi a, Vi b) { return _mm512_add_epi32(a, b); }
FASTATTN_FN Vi visub(Vi a, Vi b) { return _mm512_sub_epi32(a, b); }
FASTATTN_FN Vi viand(Vi a, Vi b) { return _mm512_and_si512(a, b); }
FASTATTN_FN Vi vixor(Vi a, Vi b) { return _mm512_xor_si512(a, b); }
FASTATTN_FN Vi vixor(Vi a, Vi b, Vi c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
template <int kBits>
FASTATTN_FN Vi vishift_right(Vi a) {
  return _mm512_srai_epi32(a, kBits);
}
FASTATTN_FN Vm viequal(Vi a, Vi b) { return _mm512_cmpeq_epi32_mask(a, b); }
FASTATTN_FN Vm vigreater_equal(Vi a, Vi b) { return _mm512_cmpge_epu32_mask(a, b); }
FASTATTN_FN Vf vfrom_int(Vi a) { return _mm512_cvtepi32_ps(a); }
FASTATTN_FN Vi viload(const uint32_t* p) { return _mm512_loadu_si512(p); }
FASTATTN_FN void vistore(uint32_t* p, Vi x) { _mm512_storeu_si512(p, x); }
FASTATTN_FN Vf vbits_as_float(Vi a) { return _mm512_castsi512_ps(a); }
FASTATTN_FN Vi vbits_as_int(Vf a) { return _mm512_castps_si512(a); }

// Lanes in pairs, as 64-bit numbers.
FASTATTN_FN Vi vimul_even(Vi a, Vi b) { return _mm512_mul_epu32(a, b); }
FASTATTN_FN Vi vihigh(Vi a) { return _mm512_srli_epi64(a, 32); }
FASTATTN_FN Vi vijoin(Vi even, Vi odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }

// Bit t of the result: is p[t] nonzero, for t < 64.
FASTATTN_FN uint64_t nonzero_bytes(const uint8_t* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(x, x);
}

FASTATTN_FN Vm first_lanes(int64_t n) { return n >= kLanes ? Vm(0xFFFF) : static_cast<Vm>((1u << n) - 1u); }

FASTATTN_FN Vf vload_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FASTATTN_FN void vstore_first(float* p, Vf x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

FASTATTN_FN Vf widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
FASTATTN_FN Vf vload_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
FASTATTN_FN Vf vload_bf16_first(const uint16_t* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FASTATTN_FN Vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FASTATTN_FN Vf vload_f16_first(const uint16_t* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

// Round to nearest even; NaN stays NaN (the addition could carry a NaN's payload into infinity).
FASTATTN_FN __m256i narrow_bf16(Vf x) {
  const Vi bits = _mm512_castps_si512(x);
  const Vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const Vm nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, viset(0x7FC00000u)), 16));
}
FASTATTN_FN void vstore_bf16(uint16_t* p, Vf x) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(x)); }
FASTATTN_FN void vstore_bf16_first(uint16_t* p, Vf x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x));
}
FASTATTN_FN __m256i narrow_f16(Vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTATTN_FN void vstore_f16(uint16_t* p, Vf x) { _mm256_storeu_si256((__m256i*)p, narrow_f16(x)); }
FASTATTN_FN void vstore_f16_first(uint16_t* p, Vf x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_f16(x));
}

FASTATTN_FN Vf vload_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
FASTATTN_FN Vf vload_i8_first(const int8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}

// Lanes of pairs of vectors are brought side by side and added, in four rounds that halve the number of vectors.
template <bool kIntegers>
FASTATTN_FN Vf add_as(Vf a, Vf b) {
  return kIntegers ? vbits_as_float(viadd(vbits_as_int(a), vbits_as_int(b))) : vadd(a, b);
}
template <bool kIntegers>
FASTATTN_FN Vf add_lanes_as(const Vf (&x)[kLanes]) {
  Vf pairs[8], quads[4], halves[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Vf a = x[2 * i], b = x[2 * i + 1];
    pairs[i] = add_as<kIntegers>(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        add_as<kIntegers>(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vf a = quads[2 * i], b = quads[2 * i + 1];
    halves[i] = add_as<kIntegers>(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  return add_as<kIntegers>(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                           _mm512_shuffle_f32x4(halves[0], halves[1], 0xDD));
}
FASTATTN_FN Vf vadd_lanes(const Vf (&x)[kLanes]) { return add_lanes_as<false>(x); }

// r[i] lane j <-> r[j] lane i, in four rounds that swap blocks of 1, 2, 4 and 8 lanes.
FASTATTN_FN void vtranspose(Vf (&r)[kLanes]) {
  Vf t[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 8) {
#pragma GCC unroll 16
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xDD);
  }
}

#if FASTATTN_BF16_DOT
// Two bfloat16 numbers in one 32-bit unit: acc + a.low * b.low + a.high * b.high.
FASTATTN_FN Vf vdot_bf16(Vf acc, Vi a, Vi b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// Two vectors rounded to bfloat16: `low` in the lower half of the register, `high` in the upper one.
FASTATTN_FN Vi vnarrow(Vf low, Vf high) { return (Vi)_mm512_cvtne2ps_pbh(high, low); }
FASTATTN_FN void vstore_low_half(uint16_t* p, Vi x) { _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(x)); }
FASTATTN_FN void vstore_high_half(uint16_t* p, Vi x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_extracti64x4_epi64(x, 1));
}

alignas(64) const uint16_t kInterleaveHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
alignas(64) const uint16_t kInterleaveLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
alignas(64) const uint16_t kInterleaveHigh[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                  24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
// Lane i of the result holds number i of the lower half and number i of the upper half.
FASTATTN_FN Vi vinterleave_halves(Vi x) { return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaveHalves), x); }
// Lanes i of the two results hold (low[i], high[i]), for 2 * kLanes numbers of two rows.
FASTATTN_FN void vinterleave_rows(Vi low, Vi high, Vi* first, Vi* second) {
  *first = _mm512_permutex2var_epi16(low, _mm512_load_si512(kInterleaveLow), high);
  *second = _mm512_permutex2var_epi16(low, _mm512_load_si512(kInterleaveHigh), high);
}
// Two 16-bit integers of a times those of b, in every lane.
FASTATTN_FN Vi vdot_i16(Vi acc, Vi a, Vi b) { return _mm512_dpwssd_epi32(acc, a, b); }
FASTATTN_FN Vi viadd_lanes(const Vi (&x)[kLanes]) {
  Vf bits[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) bits[i] = vbits_as_float(x[i]);
  return vbits_as_int(add_lanes_as<true>(bits));
}
FASTATTN_FN Vi vround(Vf x) { return _mm512_cvtps_epi32(x); }
FASTATTN_FN void vistore_shorts(void* p, Vi x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x)); }
// 2 * kLanes bytes as 16-bit integers.
FASTATTN_FN Vi vload_i8_pairs(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
FASTATTN_FN Vi vload_i8_pairs_first(const int8_t* p, int64_t n) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1u, p));
}

// The first n (at most 2 * kLanes) bfloat16 numbers of a row as 32-bit pairs, zero beyond.
FASTATTN_FN Vi vload_pairs_first(const uint16_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1u, p);
}
#endif

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
