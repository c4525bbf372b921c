// From a product q . k to a score, and what the passes need of it: masks, scale, softcap, bias, ALiBi, dropout, on
// accumulator tiles (gemm.cuh has their layout). The forward pass and dq see tiles as [query][key], dk and dv as
// [key][query]; both meet here, in one element-wise function each.
#pragma once

#include <math.h>

#include "core/mask.h"
#include "core/params.h"
#include "core/philox.h"
#include "core/score.h"
#include "cuda/attention.h"
#include "cuda/rows.cuh"

namespace fastattn::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();

// The numbers of AttentionParams as the kernels use them.
struct ScoreConstants {
  float scale = 1.0f;
  float scale_log2 = 1.0f;  // scale * log2(e), for exp2
  float softcap = 0.0f, inverse_softcap = 0.0f;
  float keep_scale = 1.0f;  // 1 / (1 - dropout_p), and 0 when everything is dropped
  uint32_t dropout_threshold = 0;
  bool has_dropout = false;
};

inline ScoreConstants score_constants(const AttentionParams& p) {
  ScoreConstants c;
  c.scale = static_cast<float>(p.scale);
  c.scale_log2 = static_cast<float>(p.scale * 1.4426950408889634);
  c.softcap = static_cast<float>(p.softcap);
  c.inverse_softcap = p.softcap > 0.0 ? static_cast<float>(1.0 / p.softcap) : 0.0f;
  c.has_dropout = p.dropout_p > 0.0;
  c.keep_scale = p.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 0.0f;
  c.dropout_threshold = p.dropout_p < 1.0 ? dropout_threshold(p.dropout_p) : 0u;
  return c;
}

// Whether a score is more than scale * q . k behind an interval mask. If not, kernels without modifiers serve, whose
// exponent is one fused multiply-add of the raw product: for that scale must be positive, so that the largest product
// makes the largest score, and 0 * -inf does not come up.
inline bool has_modifiers(const AttentionParams& p) {
  return p.bias || p.mask || p.alibi_slopes || p.softcap > 0.0 || p.dropout_p > 0.0 ||
         !(static_cast<float>(p.scale) > 0.0f);
}

struct DropoutSeed {
  uint64_t seed, offset;
};
FASTATTN_DEVICE DropoutSeed dropout_seed(const AttentionParams& p) {
  if (p.rng_state == nullptr) return {p.seed, p.offset};
  return {static_cast<uint64_t>(p.rng_state[0]), static_cast<uint64_t>(p.rng_state[1])};
}

// Element `at` of an array of `type`.
FASTATTN_DEVICE float load_as_float(const void* base, DType type, int64_t at) {
  if (type == DType::kFloat32) return static_cast<const float*>(base)[at];
  const uint16_t bits = static_cast<const uint16_t*>(base)[at];
  return type == DType::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// First visible key of row i, and one past the last.
struct RowInterval {
  int lo, hi;
};
FASTATTN_DEVICE RowInterval row_interval(const MaskGeometry& g, int i) {
  return {static_cast<int>(lo(g, i)), static_cast<int>(hi(g, i))};
}

// The geometry of sequence b, computed anew for each tile that needs it: in the kernels' loops registers are scarce.
FASTATTN_DEVICE MaskGeometry geometry_again(const AttentionParams& p, int b) {
  return mask_geometry(p, opaque(static_cast<uint32_t>(b)));
}

// The same in 32 bits, for sequences that may be packed: row i sees the keys from i + lo_offset to before
// i + hi_offset, as far as they exist. Offsets end at -kMaxLength and kMaxLength, beyond which nothing changes, so that
// no sum overflows. MaskGeometry would take twice the registers, and not all kernels have them.
struct Intervals {
  int keys = 0, lo_offset = 0, hi_offset = 0;
  int diagonal = 0;  // row i sits there at key i + diagonal for ALiBi, whatever the alignment of the mask
  int rows = 0;
};
FASTATTN_DEVICE Intervals intervals(const AttentionParams& p, int b) {
  const MaskGeometry g = sequence_geometry(p, b);
  return {static_cast<int>(g.Lk), static_cast<int>(max_i64(g.offset - g.left, -kMaxLength)),
          static_cast<int>(min_i64(g.offset + g.right + 1, kMaxLength)), static_cast<int>(g.Lk - g.Lq),
          static_cast<int>(g.Lq)};
}
FASTATTN_DEVICE int clamp_key(int j, int keys) { return j < 0 ? 0 : j < keys ? j : keys; }
FASTATTN_DEVICE RowInterval row_interval(const Intervals& g, int i) {
  return {clamp_key(i + g.lo_offset, g.keys), clamp_key(i + g.hi_offset, g.keys)};
}
FASTATTN_DEVICE int alibi_distance(const Intervals& g, int i, int j) {
  const int distance = i + g.diagonal - j;
  return distance < 0 ? -distance : distance;
}

// scale and softcap, with the softcap's derivative.
struct CappedScore {
  float value, derivative;
};
FASTATTN_DEVICE CappedScore capped(const ScoreConstants& c, float product) {
  const float x = multiply(c.scale, product);
  if (!(c.softcap > 0.0f)) return {x, 1.0f};
  const float t = tanhf(x * c.inverse_softcap);
  return {multiply(c.softcap, t), softcap_derivative(t)};
}

// What follows the softcap: bias, ALiBi and the boolean mask, of query head h in batch b. Only for keys that the row's
// interval shows: nothing is read for others, which may not exist.
template <class Geometry>
FASTATTN_DEVICE float modified(const AttentionParams& p, const Geometry& g, float score, int b, int h, int i, int j) {
  if (p.mask) {
    const int64_t* stride = p.mask_stride;
    if (!p.mask[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]]) return -kInfinity;
  }
  if (p.bias) {
    const int64_t* stride = p.bias_stride;
    const int64_t at = b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
    score = add(score, load_as_float(p.bias, p.bias_dtype, at));
  }
  if (p.alibi_slopes) {
    const float slope = static_cast<const float*>(p.alibi_slopes)[b * p.alibi_stride[0] + h * p.alibi_stride[1]];
    score = add(score, -multiply(slope, static_cast<float>(alibi_distance(g, i, j))));
  }
  return score;
}

// Which of the four elements of an accumulator tile dropout keeps: bit e for element e. The tile's corner is (i0, j0),
// j0 a multiple of 4; all lanes of the warp take part. One Philox call decides on four neighbouring keys, and a lane
// holds only some of them, so that lanes draw for each other:
//
// [query][key]: lanes t and t ^ 1 hold keys 4n..4n+3 of rows g and g + 8. The even one draws for row g, the odd one for
// row g + 8, and each hands over the half that the other one needs. The two rows may be of different heads.
FASTATTN_DEVICE uint32_t dropout_bits(DropoutSeed seed, uint32_t threshold, int64_t bh_low, int64_t bh_high, int i_low,
                                      int i_high, int j0) {
  const int t = thread_index() & 3;
  const bool is_odd = t & 1;
  const PhiloxWords words =
      philox4x32(seed.seed, static_cast<uint32_t>((j0 >> 2) + (t >> 1)), static_cast<uint32_t>(is_odd ? i_high : i_low),
                 static_cast<uint32_t>(is_odd ? bh_high : bh_low), static_cast<uint32_t>(seed.offset));
  uint32_t drawn = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) drawn |= static_cast<uint32_t>(words.w[e] >= threshold) << e;
  const uint32_t others = shuffle_xor(drawn, 1);
  // Even lanes own words 0 and 1, odd ones 2 and 3.
  return is_odd ? ((others >> 2) & 3u) | ((drawn >> 2) & 3u) << 2 : (drawn & 3u) | (others & 3u) << 2;
}

// [key][query]: element e is key j0 + g + 8 (e / 2), query i0 + 2t + e % 2. The four lanes with the same t and g / 4
// share the four draws for keys 4n..4n+3 at both e / 2 and both e % 2: each makes one, and hands out its words.
FASTATTN_DEVICE uint32_t dropout_bits_transposed(DropoutSeed seed, uint32_t threshold, int64_t bh, int i0, int j0) {
  const int lane = thread_index() & 31;
  const int t = lane & 3, quad = lane >> 4, member = (lane >> 2) & 3;  // g = 4 quad + member
  const int i = i0 + 2 * t + (member & 1), j = j0 + 4 * quad + 8 * (member >> 1);
  const PhiloxWords words = philox4x32(seed.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                                       static_cast<uint32_t>(bh), static_cast<uint32_t>(seed.offset));
  uint32_t drawn = 0;  // bit 4 e + key: draw e is this lane's own, the others are still 0
#pragma unroll
  for (int key = 0; key < 4; ++key) drawn |= static_cast<uint32_t>(words.w[key] >= threshold) << (4 * member + key);
  drawn |= shuffle_xor(drawn, 4);
  drawn |= shuffle_xor(drawn, 8);
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) bits |= (drawn >> (4 * e + member) & 1u) << e;
  return bits;
}

}  // namespace fastattn::cuda
