// The two products of decode.h, for a few query rows:
//
//   S = Q K^T    four units of a key's row are broadcast to the quads of a vector, where they meet the same units of as
//                many query rows, one in each quad. Of a score four sums are left to add, not as many as lanes.
//   O = P V      lanes are head dims: a weight, broadcast, times a row of V. bfloat16 dot products take two keys at a
//                time, those of bytes four, whose rows are interleaved in registers.
//
// Every key has a pointer to its row.
#pragma once

#include <string.h>

#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Keys of a block: as many as leave scores and weights in the first-level cache, and the next block's rows in the second.
constexpr int64_t kDecodeKeys = 64;
constexpr int64_t kKeyWords = kDecodeKeys / 64;  // 64 keys in a word of a mask
constexpr int64_t kQuads = kLanes / 4;           // query rows in a vector of the product Q K^T
constexpr int64_t kRowTile = 4;                  // rows of an item are padded to whole tiles
constexpr int64_t kKeyGroup = 8;                 // keys whose scores are computed together
static_assert(kRowTile % kQuads == 0);

// What the products read of rows of K and V, by the arithmetic: floats, into which elements are widened; pairs of
// bfloat16 numbers; or the bytes of an int8 cache.
template <class ElementType>
struct FloatKeys {
  using Element = ElementType;
  using Raw = typename Element::Raw;
  using Unit = Float32Unit;
  static constexpr bool kPairs = false;
  static constexpr bool kScaled = sizeof(Raw) == 1;  // rows are numbers times a scale of their own
  static constexpr bool kQuantises = false;
  static constexpr int kExp2Degree = 5;
  FASTATTN_FN int64_t units(int64_t columns) { return round_up(columns, 4); }  // of a row of K, in whole quads
  // Are rows of K read as they lie?
  FASTATTN_FN bool in_place(int64_t columns) { return sizeof(Raw) == sizeof(float) && columns % 4 == 0; }
  FASTATTN_FN void copy(float* to, const char* row, int64_t columns) {
    widen_rows<Element>(to, 0, reinterpret_cast<const Raw*>(row), 0, 1, columns, 1, round_up(columns, kLanes));
  }
};
#if FASTATTN_BF16_DOT
struct Bf16Keys {
  using Element = BFloat16;
  using Raw = uint16_t;
  using Unit = Bf16Pair;
  static constexpr bool kPairs = true;
  static constexpr bool kScaled = false;
  static constexpr bool kQuantises = false;
  static constexpr int kExp2Degree = 3;
  FASTATTN_FN int64_t units(int64_t columns) { return round_up((columns + 1) / 2, 4); }
  FASTATTN_FN bool in_place(int64_t columns) { return columns % 8 == 0; }
  FASTATTN_FN void copy(float* to, const char* row, int64_t columns) {
    copy_pairs(reinterpret_cast<uint16_t*>(to), 0, reinterpret_cast<const uint16_t*>(row), 0, 1, columns, 1,
               round_up(columns, 2 * kLanes));
  }
};

// Products of bytes: queries and weights become 16-bit integers for the while, 256 high + low, in units of a 32512th of
// the largest of a row (of weights: of a row and block). That is far below what bfloat16 loses of either, but not below
// float32's rounding, so that this serves bfloat16 queries alone. The instruction multiplies unsigned by signed bytes: a
// number n of the cache is read as n + 128, and a sum starts from minus what that adds to it.
struct Int8Keys {
  using Element = Int8;
  using Raw = int8_t;
  static constexpr bool kPairs = false;
  static constexpr bool kScaled = true;
  static constexpr bool kQuantises = true;
  static constexpr int kExp2Degree = 3;
  FASTATTN_FN int64_t units(int64_t columns) { return round_up((columns + 3) / 4, 4); }
  FASTATTN_FN bool in_place(int64_t columns) { return columns % 16 == 0; }
  FASTATTN_FN void copy(float* to, const char* row, int64_t columns) {
    memset(reinterpret_cast<char*>(to) + columns / 16 * 16, 0, 16);
    memcpy(to, row, static_cast<size_t>(columns));
  }
};
#endif

// Into the second-level cache: the first would have to give up what is at work.
FASTATTN_FN void fetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// ---- S = Q K^T ------------------------------------------------------------------------------------------------------

template <class Unit>
FASTATTN_FN typename Unit::Operand load_quad(const char* p) {
  const Vf x = vload_quad(reinterpret_cast<const float*>(p));
  if constexpr (__is_same(Unit, Float32Unit)) {
    return x;
  } else {
    return vbits_as_int(x);
  }
}

// Scores of NK keys for NG vectors of rows.
template <class Keys, int NG, int NK>
FASTATTN_FN void score_keys(const char* const* k, const float* q, int64_t units, float* s) {
  using Unit = typename Keys::Unit;
  const char* row[NK];
  Vf acc[NG][NK];
#pragma GCC unroll 8
  for (int c = 0; c < NK; ++c) {
    row[c] = k[c];
#pragma GCC unroll 2
    for (int g = 0; g < NG; ++g) acc[g][c] = vzero();
  }
  const char* from = reinterpret_cast<const char*>(q);
  for (int64_t at = 0; at < units * 4; at += 16) {
    typename Unit::Operand rows[NG];
#pragma GCC unroll 2
    for (int g = 0; g < NG; ++g) rows[g] = Unit::load(from + (g * units * 4 + at) * kQuads);
#pragma GCC unroll 8
    for (int c = 0; c < NK; ++c) {
      const typename Unit::Operand key = load_quad<Unit>(row[c] + at);
#pragma GCC unroll 2
      for (int g = 0; g < NG; ++g) acc[g][c] = Unit::multiply_add(rows[g], key, acc[g][c]);
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < NG; ++g) {
#pragma GCC unroll 2
    for (int c = 0; c < NK; c += 4) {
      vstore_quads(s + g * kQuads * kDecodeKeys + c, kDecodeKeys,
                   vadd_quads(acc[g][c], acc[g][c + 1], acc[g][c + 2], acc[g][c + 3]));
    }
  }
}

#if FASTATTN_BF16_DOT
constexpr float kQuanta = 32512.0f;            // 127 * 256
constexpr uint32_t kByteOffset = 0x80808080u;  // turns signed bytes into unsigned ones, 128 more

// x rounded is 256 high + low, |x| <= kQuanta; both fit signed bytes.
struct HighLow {
  Vi high, low;
};
FASTATTN_FN HighLow split_quanta(Vf x) {
  const Vi i = vround(x);
  const Vi high = vishift_right<8>(viadd(i, viset(128)));
  return {high, visub(i, vishift_left<8>(high))};
}
FASTATTN_FN Vf join_quanta(Vi high, Vi low) { return vfma(vfrom_int(high), vset(256.0f), vfrom_int(low)); }

// How many quanta make 1 where `largest` makes kQuanta. What float32 hardly tells from 0 counts as 0.
FASTATTN_FN float quanta_of_one(float largest) { return largest > 1e-30f ? kQuanta / largest : 0.0f; }

// Rows of q in quanta: for each vector of rows [high, low][kLanes] that their sums start from, then [units / 4][high,
// low][kLanes].
FASTATTN_FN int64_t quantised_query_floats(int64_t units) { return (2 + units / 2) * kLanes; }

// Row r, a float row padded with zeros to whole quads. Returns the value of a quantum; NaN where q has NaN or infinity.
inline float quantise_query(const float* row, int64_t units, int64_t r, float* q) {
  Vf top = vzero(), check = vzero();
  for (int64_t u = 0; u < units; u += 4) {
    const Vf x = vload(row + u * 4);
    top = vmax(top, vabs(x));
    check = vfma(x, vzero(), check);
  }
  const float largest = vreduce_max(top);
  const Vf factor = vset(quanta_of_one(largest));
  float* group = q + r / kQuads * quantised_query_floats(units);
  Vi sum_high = viset(0), sum_low = viset(0);
  for (int64_t u = 0; u < units; u += 4) {
    const HighLow x = split_quanta(vmul(vload(row + u * 4), factor));
    float* to = group + (2 + u / 2) * kLanes + r % kQuads * 4;
    vistore_bytes(to, x.high);
    vistore_bytes(to + kLanes, x.low);
    sum_high = viadd(sum_high, x.high);
    sum_low = viadd(sum_low, x.low);
  }
  const int32_t start[8] = {-128 * vireduce_add(sum_high), 0, 0, 0, -128 * vireduce_add(sum_low), 0, 0, 0};
  memcpy(group + r % kQuads * 4, start, 16);
  memcpy(group + kLanes + r % kQuads * 4, start + 4, 16);
  return largest * (1.0f / kQuanta) + vreduce_add(check);
}

// Scores of kKeyGroup keys for a vector of rows, in quanta.
FASTATTN_FN void score_keys_int8(const char* const* k, const float* q, int64_t units, float* s) {
  const Vi offset = viset(kByteOffset);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(q);
  Vi high[kKeyGroup], low[kKeyGroup];
#pragma GCC unroll 8
  for (int c = 0; c < kKeyGroup; ++c) {
    high[c] = viload(from);
    low[c] = viload(from + kLanes);
  }
  from += 2 * kLanes;
  for (int64_t at = 0; at < units * 4; at += 16, from += 2 * kLanes) {
    const Vi rows_high = viload(from), rows_low = viload(from + kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kKeyGroup; ++c) {
      const Vi key = vixor(vbits_as_int(vload_quad(reinterpret_cast<const float*>(k[c] + at))), offset);
      high[c] = vdot_bytes(high[c], key, rows_high);
      low[c] = vdot_bytes(low[c], key, rows_low);
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < kKeyGroup; c += 4) {
    vstore_quads(s + c, kDecodeKeys,
                 vadd_quads(join_quanta(high[c], low[c]), join_quanta(high[c + 1], low[c + 1]),
                            join_quanta(high[c + 2], low[c + 2]), join_quanta(high[c + 3], low[c + 3])));
  }
}
#endif

// ---- O = P V --------------------------------------------------------------------------------------------------------

// o[r][d] = o[r][d] * rescale[r] + sum of weight times value, for RT rows and NV vectors of head dims from d0 on, or,
// where kTail, for as many of them as there are. Pairs of keys take two vectors of head dims at a time.
template <class Keys, int RT, int NV, bool kTail>
FASTATTN_FN void sum_values(const float* w, const char* const* v, const char* const* next, int64_t nk, int64_t d0,
                            int64_t columns, const float* rescale, float* o, int64_t o_width) {
  using Element = typename Keys::Element;
  using Raw = typename Keys::Raw;
  Vf acc[RT][NV];
#pragma GCC unroll 4
  for (int r = 0; r < RT; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[r][n] = vzero();
  }
  const int64_t at = d0 * static_cast<int64_t>(sizeof(Raw));
  if constexpr (!Keys::kPairs) {
    for (int64_t c = 0; c < nk; ++c) {
      const Raw* row = reinterpret_cast<const Raw*>(v[c] + at);
      if (next != nullptr) fetch_row(next[c] + at, NV * kLanes * sizeof(Raw));
      Vf x[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        x[n] =
            kTail ? Element::load_first(row + n * kLanes, columns - d0 - n * kLanes) : Element::load(row + n * kLanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const Vf weight = vset(w[r * kDecodeKeys + c]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[r][n] = vfma(weight, x[n], acc[r][n]);
      }
    }
  }
#if FASTATTN_BF16_DOT
  else {
    for (int64_t c = 0; c < nk; c += 2) {
      const uint16_t* low = reinterpret_cast<const uint16_t*>(v[c] + at);
      const uint16_t* high = reinterpret_cast<const uint16_t*>(v[c + 1] + at);
      if (next != nullptr) {
        fetch_row(next[c] + at, NV * kLanes * 2);
        fetch_row(next[c + 1] + at, NV * kLanes * 2);
      }
      Vi x[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; n += 2) {
        const int64_t left = kTail ? columns - d0 - n * kLanes : 2 * kLanes;
        vinterleave_rows(vload_pairs_first(low + n * kLanes, left), vload_pairs_first(high + n * kLanes, left), &x[n],
                         &x[n + 1]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const Vi weights = Bf16Pair::broadcast(reinterpret_cast<const char*>(w + r * kDecodeKeys + c / 2));
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[r][n] = vdot_bf16(acc[r][n], weights, x[n]);
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
      vstore(to, vfma(vload(to), factor, acc[r][n]));
    }
  }
}

#if FASTATTN_BF16_DOT
// What the sums over a row's weights start from, and the value of a quantum.
struct WeightQuanta {
  int32_t start_high, start_low;
  float value;
};

// The weights of nk keys, in place: for every kLanes keys as many high bytes, then as many low ones.
inline WeightQuanta quantise_weights(float* w, int64_t nk) {
  Vf top = vzero(), check = vzero();
  for (int64_t c = 0; c < nk; c += kLanes) {
    const Vf x = vload(w + c);
    top = vmax(top, vabs(x));
    check = vfma(x, vzero(), check);
  }
  const float largest = vreduce_max(top);
  const Vf factor = vset(quanta_of_one(largest));
  Vi sum_high = viset(0), sum_low = viset(0);
  for (int64_t c = 0; c < nk; c += kLanes) {
    const HighLow x = split_quanta(vmul(vload(w + c), factor));
    vistore_bytes(w + c / 2, x.high);
    vistore_bytes(w + c / 2 + 4, x.low);
    sum_high = viadd(sum_high, x.high);
    sum_low = viadd(sum_low, x.low);
  }
  return {-128 * vireduce_add(sum_high), -128 * vireduce_add(sum_low), largest * (1.0f / kQuanta) + vreduce_add(check)};
}

constexpr int64_t kInt8Dims = 4 * kLanes;  // head dims that are summed together

// sum_values for RT rows and kInt8Dims head dims, or as many as there are. Four keys are interleaved: in o, quad 4 n + m
// of the head dims stands at 4 m + n.
template <int RT>
FASTATTN_FN void sum_values_int8(const float* w, const char* const* v, const char* const* next, int64_t nk, int64_t d0,
                                 int64_t columns, const WeightQuanta* quanta, const float* rescale, float* o,
                                 int64_t o_width) {
  const Vi offset = viset(kByteOffset);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vi high[RT][2], low[RT][2];
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r) {
      high[r][0] = high[r][1] = viset(static_cast<uint32_t>(quanta[r].start_high));
      low[r][0] = low[r][1] = viset(static_cast<uint32_t>(quanta[r].start_low));
    }
    for (int64_t c = 0; c < nk; c += 4) {
      if (half == 0 && next != nullptr) {
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) fetch_row(next[c + t] + d0, kInt8Dims);
      }
      Vi rows[4], x[2];
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) rows[t] = viload_bytes_first(v[c + t] + d0, columns - d0);
      vinterleave_bytes(rows, half, x);
      x[0] = vixor(x[0], offset);
      x[1] = vixor(x[1], offset);
#pragma GCC unroll 4
      for (int r = 0; r < RT; ++r) {
        const char* at = reinterpret_cast<const char*>(w + r * kDecodeKeys) + c / kLanes * 2 * kLanes + c % kLanes;
        const Vi weights_high = Bf16Pair::broadcast(at), weights_low = Bf16Pair::broadcast(at + kLanes);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          high[r][n] = vdot_bytes(high[r][n], x[n], weights_high);
          low[r][n] = vdot_bytes(low[r][n], x[n], weights_low);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RT; ++r) {
      const Vf factor = vset(rescale[r]), value = vset(quanta[r].value);
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        float* to = o + r * o_width + d0 + (2 * half + n) * kLanes;
        vstore(to, vfma(vload(to), factor, vmul(join_quanta(high[r][n], low[r][n]), value)));
      }
    }
  }
}

// Puts the head dims of a row of such sums in order.
inline void order_dims(float* o, int64_t columns) {
  for (int64_t d = 0; d < columns; d += kInt8Dims) {
    float from[kInt8Dims];
    memcpy(from, o + d, sizeof from);
    for (int64_t quad = 0; quad < 16; ++quad) memcpy(o + d + 4 * quad, from + 16 * (quad % 4) + quad / 4 * 4, 16);
  }
}
#endif

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
