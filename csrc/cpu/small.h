// Heads with a handful of queries and keys, forward and backward.
//
// With so few rows the tiles of forward.h and backward.h would hold mostly padding. Here lanes are head dims: a score
// is a dot product, and every other product a sum of rows. Scores are few, so their modifiers are plain scalar code;
// the semantics are those of core/params.h, all of them.
#pragma once

#include <string.h>

#include "core/mask.h"
#include "core/philox.h"
#include "core/score.h"
#include "core/sequence.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/row_statistics.h"
#include "cpu/vector_math.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Up to this many scores dot products win over tiles. Of 1024 heads with D = 64 (float32, AVX-512, one core), 1 x 1
// took 0.07 ms against 0.48 forward and 0.13 against 1.19 backward; 4 x 4, 0.35 against 0.58 and 0.63 against 1.66; 8 x
// 8, 1.01 against 0.71 and 2.0 against 3.0.
constexpr int64_t kSmallScores = 64;
FASTATTN_FN bool is_small_backward(const AttentionParams& p) { return p.w == nullptr && p.Lq * p.Lk <= kSmallScores; }

// Scores of a head, [row][key].
struct SmallTile {
  float s[kSmallScores + kLanes];        // scores, then weights
  float tanh[kSmallScores + kLanes];     // of the softcap
  float dropout[kSmallScores + kLanes];  // 0 or 1 / (1 - p)
  float ds[kSmallScores + kLanes];       // dP, then dS
};

template <class Element>
FASTATTN_FN float load_scalar(const void* base, int64_t at) {
  return vreduce_add(Element::load_first(static_cast<const typename Element::Raw*>(base) + at, 1));
}

inline float load_bias(const AttentionParams& p, int64_t at) {
  switch (p.bias_dtype) {
    case DType::kBFloat16:
      return load_scalar<BFloat16>(p.bias, at);
    case DType::kFloat16:
      return load_scalar<Float16>(p.bias, at);
    default:
      return load_scalar<Float32>(p.bias, at);
  }
}

// Fills t.s with the scores of a head, -inf where a key is hidden, and t.dropout.
template <class Element>
inline void small_scores(const AttentionParams& p, const MaskGeometry& g, int64_t b, int64_t hq, SmallTile& t) {
  using Raw = typename Element::Raw;
  const int64_t hkv = hq / (p.Hq / p.Hkv);
  const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
  const float slope = p.alibi_slopes == nullptr
                          ? 0.0f
                          : static_cast<const float*>(p.alibi_slopes)[b * p.alibi_stride[0] + hq * p.alibi_stride[1]];
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const float kept = p.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 0.0f;
  for (int64_t i = 0; i < p.Lq; ++i) {
    const Raw* q = row_at<const Raw>(p.q, p.q_stride, b, hq, i);
    for (int64_t j = 0; j < p.Lk; ++j) {
      const int64_t at = i * p.Lk + j;
      t.s[at] = -__builtin_inff();
      if (!keep(g, i, j)) continue;
      if (p.mask != nullptr &&
          p.mask[b * p.mask_stride[0] + hq * p.mask_stride[1] + i * p.mask_stride[2] + j * p.mask_stride[3]] == 0) {
        continue;
      }
      float x = scale * dot<Element>(q, row_at<const Raw>(p.k, p.k_stride, b, hkv, j), p.D);
      if (cap != 0.0f) {
        t.tanh[at] = vreduce_max(vtanh(vset(x / cap)));
        x = softcap_value(t.tanh[at], cap);
      }
      if (p.bias != nullptr) {
        x += load_bias(p, b * p.bias_stride[0] + hq * p.bias_stride[1] + i * p.bias_stride[2] + j * p.bias_stride[3]);
      }
      if (slope != 0.0f) x -= slope * static_cast<float>(alibi_distance(g, i, j));
      t.s[at] = x;
      if (p.dropout_p > 0.0) {
        t.dropout[at] = dropout_keeps(p.seed, p.offset, dropout_head(p, b, hq), i, j, threshold) ? kept : 0.0f;
      }
    }
  }
}

// row[j] = exp(row[j] - base) for j < n; returns their sum.
inline float small_exp(float* row, int64_t n, float base) {
  Vf sum = vzero();
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vf x = n - j >= kLanes ? vload(row + j) : vload_first(row + j, n - j);
    Vf w = vexp(vsub(x, vset(base)));
    if (n - j < kLanes) {  // lanes past the row hold exp(-base)
      vstore_first(row + j, w, n - j);
      w = vload_first(row + j, n - j);
    } else {
      vstore(row + j, w);
    }
    sum = vadd(sum, w);
  }
  return vreduce_add(sum);
}

// to = (accumulate ? to : 0) + sum_r factor[r * factor_stride] * rows[r], the rows of a tensor, for `columns` columns
// rounded up to whole vectors.
template <class Element>
inline void sum_of_rows(float* to, bool accumulate, const float* factor, int64_t factor_stride,
                        const typename Element::Raw* rows, int64_t row_stride, int64_t count, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vf sum = accumulate ? vload(to + c) : vzero();
    for (int64_t r = 0; r < count; ++r) {
      const float f = factor[r * factor_stride];
      // What a hidden key holds may be NaN: its weight of 0 must not meet it.
      if (f != 0.0f) sum = vfma(vset(f), Element::load_first(rows + r * row_stride + c, columns - c), sum);
    }
    vstore(to + c, sum);
  }
}

template <class Element>
inline void small_forward(const AttentionParams& p, int64_t b, int64_t hq, float* row) {
  using Raw = typename Element::Raw;
  SmallTile t;
  const MaskGeometry g = mask_geometry(p, b);
  const int64_t hkv = hq / (p.Hq / p.Hkv);
  small_scores<Element>(p, g, b, hq, t);
  for (int64_t i = 0; i < p.Lq; ++i) {
    float* s = t.s + i * p.Lk;
    float m = -__builtin_inff(), l = 0.0f;
    for (int64_t j = 0; j < p.Lk; ++j) m = s[j] > m ? s[j] : m;
    const bool is_empty = m == -__builtin_inff();
    if (!is_empty && p.sinks != nullptr) {
      const float sink = static_cast<const float*>(p.sinks)[hq];
      m = sink > m ? sink : m;
      l = __builtin_expf(sink - m);
    }
    // A row of NaN has m = -inf as well, and must stay NaN; a hidden one has only -inf, and weights of 0.
    l += small_exp(s, p.Lk, is_empty ? 0.0f : m);
    const float inverse_sum = l == 0.0f ? 0.0f : 1.0f / l;
    for (int64_t j = 0; j < p.Lk; ++j) s[j] *= inverse_sum;
    if (p.dropout_p > 0.0) {
      for (int64_t j = 0; j < p.Lk; ++j) s[j] = s[j] != 0.0f ? s[j] * t.dropout[i * p.Lk + j] : 0.0f;
    }
    sum_of_rows<Element>(row, false, s, 1, row_at<const Raw>(p.v, p.v_stride, b, hkv, 0), p.v_stride[2], p.Lk, p.Dv);
    narrow_rows<Element>(row_at<Raw>(p.o, p.o_stride, b, hq, i), 0, row, 0, 1, p.Dv);
    write_row_statistics(p, b, hq, i, m, l);
  }
}

// One (b, hkv) with all its query heads. dk and dv are scratch, [Lk][D] and [Lk][Dv] with rows of whole vectors; row is
// one such row.
template <class Element>
inline void small_backward(const AttentionGradParams& gp, int64_t b, int64_t hkv, float* d_sinks, float* dk, float* dv,
                           float* row) {
  using Raw = typename Element::Raw;
  const AttentionParams& p = gp.forward;
  const MaskGeometry g = mask_geometry(p, b);
  const int64_t group = p.Hq / p.Hkv;
  const int64_t k_width = round_up(p.D, kLanes), v_width = round_up(p.Dv, kLanes);
  for (int64_t hq = hkv * group; hq < (hkv + 1) * group; ++hq) {
    const bool is_first = hq == hkv * group;
    SmallTile t;
    small_scores<Element>(p, g, b, hq, t);
    float d_sink = 0.0f;
    for (int64_t i = 0; i < p.Lq; ++i) {
      const int64_t at = stat_index(p, b, hq, i);
      const float m = static_cast<const float*>(p.row_max)[at], l = static_cast<const float*>(p.row_sum)[at];
      const float d_lse = gp.d_lse != nullptr ? static_cast<const float*>(gp.d_lse)[at] : 0.0f;
      const Raw* d_o = row_at<const Raw>(gp.d_o, gp.d_o_stride, b, hq, i);
      float* s = t.s + i * p.Lk;
      float* ds = t.ds + i * p.Lk;
      if (l == 0.0f) {
        for (int64_t j = 0; j < p.Lk; ++j) s[j] = ds[j] = 0.0f;
        continue;
      }
      small_exp(s, p.Lk, m);
      // delta = sum_j P dP, from dP itself: with o it would carry o's rounding.
      float delta = 0.0f;
      for (int64_t j = 0; j < p.Lk; ++j) {
        s[j] /= l;
        ds[j] = 0.0f;
        if (s[j] == 0.0f) continue;
        ds[j] = dot<Element>(d_o, row_at<const Raw>(p.v, p.v_stride, b, hkv, j), p.Dv);
        if (p.dropout_p > 0.0) ds[j] *= t.dropout[i * p.Lk + j];
        delta += s[j] * ds[j];
      }
      delta -= d_lse;
      if (gp.d_sinks != nullptr) {
        d_sink -= __builtin_expf(static_cast<const float*>(p.sinks)[hq] - m) / l * delta;
      }
      for (int64_t j = 0; j < p.Lk; ++j) {
        const int64_t score = i * p.Lk + j;
        ds[j] = s[j] * (ds[j] - delta);
        if (gp.d_bias != nullptr) {
          const int64_t* stride = gp.d_bias_stride;
          static_cast<float*>(gp.d_bias)[b * stride[0] + hq * stride[1] + i * stride[2] + j * stride[3]] += ds[j];
        }
        if (s[j] == 0.0f) continue;  // a hidden key has no tanh and no dropout
        if (p.softcap != 0.0) ds[j] *= softcap_derivative(t.tanh[score]);
        ds[j] *= static_cast<float>(p.scale);
        if (p.dropout_p > 0.0) s[j] *= t.dropout[score];
      }
    }
    if (d_sinks != nullptr) d_sinks[b * p.Hq + hq] = d_sink;

    const Raw* q0 = row_at<const Raw>(p.q, p.q_stride, b, hq, 0);
    const Raw* k0 = row_at<const Raw>(p.k, p.k_stride, b, hkv, 0);
    const Raw* d_o0 = row_at<const Raw>(gp.d_o, gp.d_o_stride, b, hq, 0);
    for (int64_t j = 0; j < p.Lk; ++j) {
      sum_of_rows<Element>(dk + j * k_width, !is_first, t.ds + j, p.Lk, q0, p.q_stride[2], p.Lq, p.D);
      sum_of_rows<Element>(dv + j * v_width, !is_first, t.s + j, p.Lk, d_o0, gp.d_o_stride[2], p.Lq, p.Dv);
    }
    for (int64_t i = 0; i < p.Lq; ++i) {
      sum_of_rows<Element>(row, false, t.ds + i * p.Lk, 1, k0, p.k_stride[2], p.Lk, p.D);
      narrow_rows<Element>(row_at<Raw>(gp.dq, gp.dq_stride, b, hq, i), 0, row, 0, 1, p.D);
    }
  }
  narrow_rows<Element>(row_at<Raw>(gp.dk, gp.dk_stride, b, hkv, 0), gp.dk_stride[2], dk, k_width, p.Lk, p.D);
  narrow_rows<Element>(row_at<Raw>(gp.dv, gp.dv_stride, b, hkv, 0), gp.dv_stride[2], dv, v_width, p.Lk, p.Dv);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
