// The two products of decode.h, for a few query rows. Lanes are head dims in both, and every key has a pointer to its
// row, which is read as it lies:
//
//   S = Q K^T    as many sums as a vector has lanes, of 4, 2 or 1 rows by 4, 8 or 16 keys (AVX-512), which are then
//                added up across their lanes all together, and make one vector of scores.
//   O = P V      a weight, broadcast, times a row of V. Products of pairs take two keys, whose rows are interleaved in
//                registers.
#pragma once

#include <string.h>

#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Keys of a block at most. They are as many as leave scores and weights in the first-level cache, and the next block's
// rows in the second: 64, or 128 of an int8 cache, whose rows are short and for which blocks are to be longer.
constexpr int64_t kDecodeKeys = 128;
constexpr int64_t kKeyWords = kDecodeKeys / 64;  // 64 keys in a word of a mask
constexpr int64_t kRowTile = 4;                  // rows of an item are padded to whole tiles

// How rows of K and V are read, and the arithmetic: kStep numbers of a row make an operand. Floats, into which elements
// are widened:
template <class ElementType>
struct FloatKeys {
  using Element = ElementType;
  using Raw = typename Element::Raw;
  using Operand = Vf;
  using Sum = Vf;
  static constexpr bool kPairs = false;
  static constexpr bool kScaled = sizeof(Raw) == 1;  // rows are numbers times a scale of their own
  static constexpr bool kQuantises = false;
  static constexpr int64_t kBlockKeys = 64;
  static constexpr int kExp2Degree = 5;
  static constexpr int64_t kStep = kLanes;

  FASTATTN_FN Operand load(const Raw* p) { return Element::load(p); }
  FASTATTN_FN Operand load_first(const Raw* p, int64_t n) { return Element::load_first(p, n); }
  FASTATTN_FN Operand query(const float* p) { return vload(p); }
  FASTATTN_FN Sum zero() { return vzero(); }
  FASTATTN_FN Sum multiply_add(Operand a, Operand b, Sum sum) { return vfma(a, b, sum); }
  FASTATTN_FN Vf add_lanes(const Sum (&sums)[kLanes]) { return vadd_lanes(sums); }
  FASTATTN_FN Vf to_float(Sum sum, float) { return sum; }
};

// How many quanta make 1 where `most` of them make the largest number. What float32 hardly tells from 0 counts as 0.
FASTATTN_FN Vf quanta_of_one(Vf largest, float most) {
  return vselect(vless(vset(1e-30f), largest), vdiv(vset(most), largest), vzero());
}

constexpr float kWeightQuanta = 32700.0f;  // of a block's largest weight, which comes out a little larger at times

#if FASTATTN_BF16_DOT
// Pairs of bfloat16 numbers:
struct Bf16Keys {
  using Element = BFloat16;
  using Raw = uint16_t;
  using Operand = Vi;
  using Sum = Vf;
  static constexpr bool kPairs = true;
  static constexpr bool kScaled = false;
  static constexpr bool kQuantises = false;
  static constexpr int64_t kBlockKeys = 64;
  static constexpr int kExp2Degree = 3;
  static constexpr int64_t kStep = 2 * kLanes;

  FASTATTN_FN Operand load(const Raw* p) { return viload(reinterpret_cast<const uint32_t*>(p)); }
  FASTATTN_FN Operand load_first(const Raw* p, int64_t n) { return vload_pairs_first(p, n); }
  FASTATTN_FN Operand query(const float* p) { return viload(reinterpret_cast<const uint32_t*>(p)); }
  FASTATTN_FN Sum zero() { return vzero(); }
  FASTATTN_FN Sum multiply_add(Operand a, Operand b, Sum sum) { return vdot_bf16(sum, a, b); }
  FASTATTN_FN Vf add_lanes(const Sum (&sums)[kLanes]) { return vadd_lanes(sums); }
  FASTATTN_FN Vf to_float(Sum sum, float) { return sum; }
};
#endif

#if FASTATTN_I16_DOT
// Pairs of 16-bit integers, of an int8 cache. Queries and weights become such integers for the while, in quanta: of the
// largest number of a row of q there are some 2^15, and so of the largest weight of a row and block. That is far below
// what bfloat16 loses of either, but not below float32's rounding, so that this serves bfloat16 queries alone.
struct Int8Keys {
  using Element = Int8;
  using Raw = int8_t;
  using Operand = Vi;
  using Sum = Vi;
  static constexpr bool kPairs = true;
  static constexpr bool kScaled = true;
  static constexpr bool kQuantises = true;
  static constexpr int64_t kBlockKeys = 128;
  static constexpr int kExp2Degree = 3;
  static constexpr int64_t kStep = 2 * kLanes;

  FASTATTN_FN Operand load(const Raw* p) { return vload_i8_pairs(p); }
  FASTATTN_FN Operand load_first(const Raw* p, int64_t n) { return vload_i8_pairs_first(p, n); }
  FASTATTN_FN Operand query(const float* p) { return viload(reinterpret_cast<const uint32_t*>(p)); }
  FASTATTN_FN Sum zero() { return viset(0); }
  FASTATTN_FN Sum multiply_add(Operand a, Operand b, Sum sum) { return vdot_i16(sum, a, b); }
  FASTATTN_FN Vf add_lanes(const Sum (&sums)[kLanes]) { return vfrom_int(viadd_lanes(sums)); }
  FASTATTN_FN Vf to_float(Sum sum, float quantum) { return vmul(vfrom_int(sum), vset(quantum)); }

  // Of the largest number; so many that the sum of a score's products stays below 2^31.
  FASTATTN_FN float quanta(int64_t columns) {
    const float most = 2147483520.0f / (128.0f * static_cast<float>(columns));
    return most < 32767.0f ? most : 32767.0f;
  }
};

// n floats, of whole vectors, to 16-bit integers in place. Returns what a quantum is; NaN where there is NaN or
// infinity.
inline float quantise(float* x, int64_t n, float most) {
  Vf top = vzero(), check = vzero();
  for (int64_t c = 0; c < n; c += kLanes) {
    const Vf part = vload(x + c);
    top = vmax(top, vabs(part));
    check = vfma(part, vzero(), check);
  }
  const float largest = vreduce_max(top);
  const Vf quanta = quanta_of_one(vset(largest), most);
  for (int64_t c = 0; c < n; c += kLanes) vistore_shorts(x + c / 2, vround(vmul(vload(x + c), quanta)));
  return largest / most + vreduce_add(check);
}
#endif

// What reads an int8 cache beside bfloat16 queries, at a level that is for bfloat16.
#if FASTATTN_BF16_DOT
#if FASTATTN_I16_DOT
using Int8CacheKeys = Int8Keys;
#else
using Int8CacheKeys = FloatKeys<Int8>;
#endif
#endif

// The rows to come, fetched line by line while others are at work: into the second-level cache, for the first would
// have to give up what it holds. In the order of memory, which leads the processor's own prefetching on.
class RowFetch {
 public:
  FASTATTN_INLINE RowFetch(const char* const* rows, int64_t count, int64_t row_bytes)
      : row_(rows), end_(rows + count), row_bytes_(row_bytes) {}
  FASTATTN_INLINE void lines(int64_t count) {
    for (int64_t n = 0; n < count && row_ != end_; ++n) {
      __builtin_prefetch(*row_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= row_bytes_) {
        at_ = 0;
        ++row_;
      }
    }
  }
  FASTATTN_INLINE void rest() {
    while (row_ != end_) lines(1);
  }

 private:
  const char* const* row_;
  const char* const* end_;
  int64_t row_bytes_, at_ = 0;
};

// Floats of a row of q.
template <class Keys>
FASTATTN_FN int64_t query_floats(int64_t columns) {
  return round_up(columns, Keys::kStep) / Keys::kStep * kLanes;
}

// Scores of kLanes / R keys for R rows, in quanta of q where that is quantised.
template <class Keys, int R>
FASTATTN_FN void score_keys(const char* const* k, const float* q, int64_t columns, float* s, RowFetch* fetch) {
  using Raw = typename Keys::Raw;
  constexpr int NK = kLanes / R;
  constexpr int64_t kLines = Keys::kStep * static_cast<int64_t>(sizeof(Raw)) * NK / 64;
  const int64_t q_stride = query_floats<Keys>(columns);
  const Raw* row[NK];
  typename Keys::Sum sum[kLanes];
#pragma GCC unroll 16
  for (int c = 0; c < NK; ++c) row[c] = reinterpret_cast<const Raw*>(k[c]);
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) sum[n] = Keys::zero();
  RowFetch ahead = *fetch;
  int64_t d = 0;
  for (; d + Keys::kStep <= columns; d += Keys::kStep, q += kLanes) {
    ahead.lines(kLines);
    typename Keys::Operand rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rows[r] = Keys::query(q + r * q_stride);
#pragma GCC unroll 16
    for (int c = 0; c < NK; ++c) {
      const typename Keys::Operand key = Keys::load(row[c] + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r * NK + c] = Keys::multiply_add(rows[r], key, sum[r * NK + c]);
    }
  }
  if (d < columns) {
#pragma GCC unroll 16
    for (int c = 0; c < NK; ++c) {
      const typename Keys::Operand key = Keys::load_first(row[c] + d, columns - d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sum[r * NK + c] = Keys::multiply_add(Keys::query(q + r * q_stride), key, sum[r * NK + c]);
      }
    }
  }
  float scores[kLanes];
  vstore(scores, Keys::add_lanes(sum));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) memcpy(s + r * kDecodeKeys, scores + r * NK, NK * sizeof(float));
  *fetch = ahead;
}

// o[r][d] = o[r][d] * rescale[r] + sum of weight times value, for RT rows and NV vectors of head dims from d0 on, or,
// where kTail, for as many of them as there are. Pairs of keys take two vectors of head dims at a time; quantum[r] is
// what their weights count.
template <class Keys, int RT, int NV, bool kTail>
FASTATTN_FN void sum_values(const float* w, const char* const* v, int64_t nk, int64_t d0, int64_t columns,
                            const float* rescale, const float* quantum, float* o, int64_t o_width, RowFetch* fetch) {
  using Raw = typename Keys::Raw;
  constexpr int64_t kRowLines = (NV * kLanes * static_cast<int64_t>(sizeof(Raw)) + 63) / 64;
  typename Keys::Sum sum[RT][NV];
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[r][n] = Keys::zero();
  }
  RowFetch ahead = *fetch;
  if constexpr (!Keys::kPairs) {
    for (int64_t c = 0; c < nk; ++c) {
      ahead.lines(kRowLines);
      const Raw* row = reinterpret_cast<const Raw*>(v[c]) + d0;
      Vf x[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        x[n] = kTail ? Keys::load_first(row + n * kLanes, columns - d0 - n * kLanes) : Keys::load(row + n * kLanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const Vf weight = vset(w[r * kDecodeKeys + c]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) sum[r][n] = Keys::multiply_add(weight, x[n], sum[r][n]);
      }
    }
  }
#if FASTATTN_BF16_DOT
  else {
    for (int64_t c = 0; c < nk; c += 2) {
      ahead.lines(2 * kRowLines);
      const Raw* low = reinterpret_cast<const Raw*>(v[c]) + d0;
      const Raw* high = reinterpret_cast<const Raw*>(v[c + 1]) + d0;
      Vi x[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; n += 2) {
        const int64_t at = n * kLanes, left = columns - d0 - at;
        vinterleave_rows(kTail ? Keys::load_first(low + at, left) : Keys::load(low + at),
                         kTail ? Keys::load_first(high + at, left) : Keys::load(high + at), &x[n], &x[n + 1]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const Vi weights = Bf16Pair::broadcast(reinterpret_cast<const char*>(w + r * kDecodeKeys + c / 2));
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) sum[r][n] = Keys::multiply_add(weights, x[n], sum[r][n]);
      }
    }
  }
#endif
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r) {
    const Vf factor = vset(rescale[r]);
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      float* to = o + r * o_width + d0 + n * kLanes;
      vstore(to, vfma(vload(to), factor, Keys::to_float(sum[r][n], quantum[r])));
    }
  }
  *fetch = ahead;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
