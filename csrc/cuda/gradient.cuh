// What the kernels of the backward pass share: its params, the statistics of a row, and the step from a product q . k
// and dP = dO . v to a weight and the gradient of its score.
//
//   w = exp(s - m) / l      dS = w (dP z - delta)      delta = dO . o - d_lse      z = dropout: 0 or 1 / (1 - p)
//
// (Dao, "FlashAttention-2", 2023, algorithm 2; Dao et al., "FlashAttention", 2022, appendix B.2 for delta.)
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/heuristics.h"
#include "cuda/rows.cuh"
#include "cuda/score.cuh"

namespace fastattn::cuda {

struct BackwardParams {
  AttentionGradParams grad;
  ScoreConstants constants;
  bool is_plain = false;       // no modifiers, 16-bit operands: see RowStatistics::m
  F32x4* row_stats = nullptr;  // of RowStatistics, placed as the rows of row_max are
  StatStrides stats;
  int key_blocks = 1, row_blocks = 1;
  bool is_aligned_q = false, is_aligned_k = false, is_aligned_v = false, is_aligned_d_o = false;
  bool is_aligned_dq = false, is_aligned_dk = false, is_aligned_dv = false;
};

// Of a query row, as 16 bytes. Rows that see nothing, and rows beyond the last, are all zero: they weigh nothing, or
// what they weigh is multiplied by a dO and a q of zeros.
struct RowStatistics {
  float m;  // row maximum; for the plain kernels lse * log2(e), which leaves them one subtraction in the exponent
  float inverse_l;  // 1 / row sum; the plain kernels have no use for it
  float delta;
  float
      gain;  // factor of dP: z of a key that is kept. 0 where one key has all the weight: dP - delta is then 0 but for
             // the rounding of o, which would leave a gradient where there is none, as for every row when Lk = 1

  FASTATTN_DEVICE RowStatistics from(F32x4 v) { return {v.x[0], v.x[1], v.x[2], v.x[3]}; }
};

// Of row i among the rows of one (batch, head); beyond the last, what weighs nothing.
FASTATTN_DEVICE RowStatistics load_statistics(const F32x4* all_stats, int64_t i, int64_t Lq) {
  if (i >= Lq) return {0.0f, 0.0f, 0.0f, 0.0f};
  return RowStatistics::from(all_stats[i]);
}

FASTATTN_DEVICE float weight_gradient(float weight, float dp, const RowStatistics& row) {
  return weight * (dp * row.gain - row.delta);
}

// Without modifiers: the raw product x becomes the weight, dp the gradient of the score. x = -inf for hidden keys.
FASTATTN_DEVICE void differentiate_plain(float& x, float& dp, const RowStatistics& row, const ScoreConstants& c) {
  x = exp2_approx(multiply_add(x, c.scale_log2, -row.m));
  dp = weight_gradient(x, dp, row);
}

// With modifiers: x becomes the weight as dropout leaves it (not yet divided by 1 - p), dp the gradient of
// scale * q . k. Returns the gradient of the score, which is the bias's. The caller has left out keys that the interval
// hides.
FASTATTN_DEVICE float differentiate_modified(float& x, float& dp, const RowStatistics& row, bool is_kept,
                                             const BackwardParams& p, const Intervals& g, int b, int h, int i, int j) {
  const CappedScore cap = capped(p.constants, x);
  const float score = modified(p.grad.forward, g, cap.value, b, h, i, j);
  const float weight = exp2_approx((score - row.m) * kLog2E) * row.inverse_l;
  const float ds = weight_gradient(weight, is_kept ? dp : 0.0f, row);
  x = is_kept ? weight : 0.0f;
  dp = ds * cap.derivative;
  return ds;
}

}  // namespace fastattn::cuda
