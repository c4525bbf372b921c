// Additive scores (Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2015,
// appendix A.1.2), and what flows back through them:
//
//   s_ij  = sum_d w_d t_ijd       t = tanh(q_id + k_jd)
//   dq_id = w_d sum_j dS_ij (1 - t^2)      dk_jd = w_d sum_i dS_ij (1 - t^2)      dw_d = sum_ij dS_ij t_ijd
//
// With E_q = e^(2q), E_k = e^(2k), computed once for each element, and u = 1 / (1 + E_q E_k):
//
//   t = 1 - 2 u        s = sum_d w_d - 2 sum_d w_d u        1 - t^2 = 4 (u - u^2)
//
// so that each (i, j, d) takes a multiply-add, a reciprocal and a multiply-add. E must neither overflow nor be clamped where
// it counts: q and k are limited to kFar, which changes nothing as long as one of the two is at most kNear: beyond
// kFar - kNear = 9.5, tanh is 1 but for less than half an ulp. A tile where both go further, which no trained model has been
// seen to have, takes its tanh one by one.
//
// Scores have lanes = query rows, as everywhere; the gradients have lanes = head dims.
#pragma once

#include "cpu/operands.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr float kNear = 17.0f, kFar = 26.5f;  // 2 (kNear + kFar) = 87 < log(FLT_MAX)
constexpr int64_t kAdditiveKeys = 4;          // whose gradients are held in registers at a time

// How the scores of a tile come about.
enum class Scoring { kDot, kAdditive, kAdditiveExact };

// e^(2x) of a vector limited to kFar; raises `largest` to its magnitude (a NaN has none, and stays one).
FASTATTN_FN Vf exponentiated(Vf x, Vf* largest) {
  *largest = vmax(vabs(x), *largest);
  const Vf limited = vmax(vset(-kFar), vmin(vset(kFar), x));
  return vexp(vadd(limited, limited));
}

// In place; rows of whole vectors. Returns whether any number is beyond kNear.
inline bool exponentiate_rows(float* rows, int64_t numbers) {
  Vf largest = vzero();
  for (int64_t c = 0; c < numbers; c += kLanes) vstore(rows + c, exponentiated(vload(rows + c), &largest));
  return vreduce_max(largest) > kNear;
}

// The same of a transposed block of rows (pack.h).
inline bool exponentiate_panels(float* panels, int64_t rows, int64_t columns, int64_t panel_columns) {
  Vf largest = vzero();
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* at = panels + panel_offset(r, panel_columns);
    for (int64_t d = 0; d < columns; ++d, at += kPanelRows) vstore(at, exponentiated(vload(at), &largest));
  }
  return vreduce_max(largest) > kNear;
}

// kExact: x and y are q and k themselves.
template <bool kRefined, bool kExact>
FASTATTN_FN Vf additive_u(Vf x, Vf y) {
  if constexpr (kExact) return vmul(vset(0.5f), vsub(vset(1.0f), vtanh(vadd(x, y))));
  return vreciprocal<kRefined>(vfma(x, y, vset(1.0f)));
}

// Scores of nk keys and NV vectors of rows. qt: the rows' panel, [d][kPanelRows]; k: [key][k_stride]; w has zeros
// up to a whole vector.
template <int NV, bool kRefined, bool kExact>
inline void additive_scores_as(const float* qt, const float* k, int64_t k_stride, const float* w, int64_t D, int64_t nk,
                            float* s, int64_t s_stride) {
  constexpr int kKeys = 2;
  Vf sum_w = vzero();
  for (int64_t d = 0; d < D; d += kLanes) sum_w = vadd(sum_w, vload(w + d));
  sum_w = vset(vreduce_add(sum_w));
  for (int64_t c = 0; c < nk; c += kKeys) {
    const float* keys[kKeys];
    for (int n = 0; n < kKeys; ++n) keys[n] = k + min_i64(c + n, nk - 1) * k_stride;
    Vf sum[kKeys][NV];
    for (int n = 0; n < kKeys; ++n) {
      for (int i = 0; i < NV; ++i) sum[n][i] = vzero();
    }
    for (int64_t d = 0; d < D; ++d) {
      const Vf wd = vset(w[d]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const Vf x = vload(qt + d * kPanelRows + i * kLanes);
#pragma GCC unroll 2
        for (int n = 0; n < kKeys; ++n) sum[n][i] = vfma(wd, additive_u<kRefined, kExact>(x, vset(keys[n][d])), sum[n][i]);
      }
    }
    for (int n = 0; n < kKeys && c + n < nk; ++n) {
      for (int i = 0; i < NV; ++i) vstore(s + (c + n) * s_stride + i * kLanes, vfma(vset(-2.0f), sum[n][i], sum_w));
    }
  }
}

template <class Operands>
constexpr bool kRefinedFor = sizeof(typename Operands::Raw) == sizeof(float);

template <int NV, class Operands>
inline void additive_scores(Scoring scoring, const float* qt, Operand k, const float* w, int64_t D, int64_t nk, float* s,
                            int64_t s_stride) {
  if constexpr (!Operands::kPairs) {
    const float* keys = reinterpret_cast<const float*>(k.data);
    const int64_t stride = k.stride_bytes / 4;
    if (scoring == Scoring::kAdditive) {
      additive_scores_as<NV, kRefinedFor<Operands>, false>(qt, keys, stride, w, D, nk, s, s_stride);
    } else {
      additive_scores_as<NV, kRefinedFor<Operands>, true>(qt, keys, stride, w, D, nk, s, s_stride);
    }
  }
}

// Rows of k (or q) as [row][padded D] numbers, up to a multiple of kAdditiveKeys.
template <class Operands>
inline Operand additive_rows(const typename Operands::Raw* from, int64_t stride, int64_t rows, int64_t D, float* to) {
  const int64_t width = Operands::padded(D);
  widen_rows<typename Operands::Element>(to, width, from, stride, rows, D, round_up(rows, kAdditiveKeys), width);
  return {reinterpret_cast<const char*>(to), width * 4};
}

template <class Operands>
inline void load_w(const AttentionParams& p, int64_t hq, float* to) {
  using Raw = typename Operands::Raw;
  const int64_t width = Operands::padded(p.D);
  widen_rows<typename Operands::Element>(to, width, static_cast<const Raw*>(p.w) + hq * p.w_stride, 0, 1, p.D, 1, width);
}

// Adds what flows back through a tile's scores, ds [key][kBlockRows]: to dq [rows][dq_stride], dk [keys][dk_stride] and dw.
// q and k are [.][width] rows, k's up to a multiple of kAdditiveKeys; ds is 0 for the keys past nk.
template <bool kRefined, bool kExact, class RowsOf>
inline void additive_gradients(const float* q, const float* k, int64_t width, const float* w, const float* ds, int64_t nk,
                               const RowsOf& rows_of, float* dq, int64_t dq_stride, float* dk, int64_t dk_stride,
                               float* dw) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vf slope = vmul(vset(4.0f), vload(w + d));
    Vf dw_sum = vzero();
    for (int64_t c = 0; c < nk; c += kAdditiveKeys) {
      Vf key[kAdditiveKeys], dk_sum[kAdditiveKeys];
      for (int n = 0; n < kAdditiveKeys; ++n) {
        key[n] = vload(k + (c + n) * width + d);
        dk_sum[n] = vzero();
      }
      const TileSpan rows = rows_of(c, min_i64(kAdditiveKeys, nk - c));
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const Vf row = vload(q + r * width + d);
        const float* gradient = ds + c * kBlockRows + r;
        Vf dq_sum = vzero();
#pragma GCC unroll 4
        for (int n = 0; n < kAdditiveKeys; ++n) {
          // -t / 2: about 0, so that sums of it do not cancel.
          const Vf t = vsub(additive_u<kRefined, kExact>(row, key[n]), vset(0.5f));
          const Vf g = vset(gradient[n * kBlockRows]);
          const Vf x = vnegative_fma(t, t, vset(0.25f));
          dq_sum = vfma(g, x, dq_sum);
          dk_sum[n] = vfma(g, x, dk_sum[n]);
          dw_sum = vfma(g, t, dw_sum);
        }
        float* to = dq + r * dq_stride + d;
        vstore(to, vfma(slope, dq_sum, vload(to)));
      }
      for (int n = 0; n < kAdditiveKeys && c + n < nk; ++n) {
        float* to = dk + (c + n) * dk_stride + d;
        vstore(to, vfma(slope, dk_sum[n], vload(to)));
      }
    }
    vstore(dw + d, vfma(vset(-2.0f), dw_sum, vload(dw + d)));
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
