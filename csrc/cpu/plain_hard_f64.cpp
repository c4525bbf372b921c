// Hard attention in float64, row by row, forward and backward; core/params.h has the formulas. The draw is written as
// in the textbook: the largest s_j - log(e_j), e_j = -log(u_j).
#include <cmath>

#include "core/gumbel.h"
#include "cpu/plain.h"
#include "cpu/plain_rows.h"

namespace fastattn::cpu {
namespace {

using plain::add_scaled;
using plain::for_each_row;
using plain::for_each_task;
using plain::is_hidden;
using plain::kMinusInfinity;
using plain::Row;
using plain::row_of;
using plain::worker_count;
using plain::zero_rows;

double gumbel_noise(const HardAttentionParams& hp, const Row& row, int64_t j) {
  if (!hp.is_sampled) return 0.0;
  const AttentionParams& p = hp.attention;
  const PhiloxWords words = philox4x32(p.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(row.i),
                                       static_cast<uint32_t>(row.b * p.Hq + row.hq), static_cast<uint32_t>(p.offset));
  return -std::log(exponential_variate<double>(words.w[j & 3]));
}

void hard_row(const HardAttentionParams& hp, const Row& row, double* scores) {
  const AttentionParams& p = hp.attention;
  row.compute_scores(scores, nullptr);
  double m = kMinusInfinity, best = kMinusInfinity;
  int64_t index = -1;
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double score = scores[j - row.begin];
    if (is_hidden(score)) continue;
    if (!(score <= m)) m = score;  // written so that a NaN gets through
    const double candidate = score + gumbel_noise(hp, row, j);
    if (candidate > best) {
      best = candidate;
      index = j;
    }
  }
  double l = 0.0;
  for (int64_t j = row.begin; j < row.end; ++j) {
    if (!is_hidden(scores[j - row.begin])) l += std::exp(scores[j - row.begin] - m);
  }
  // A NaN among the scores: no key is better than another.
  if (std::isnan(l)) index = first_visible_key(p, row.geometry, row.b, row.hq, row.i);

  hp.index[row.stat()] = index;
  static_cast<double*>(hp.log_prob)[row.stat()] = index < 0 ? 0.0 : (scores[index - row.begin] - m) - std::log(l);
  double* o = row_of(static_cast<double*>(p.o), p.o_stride, row.b, row.hq, row.i);
  for (int64_t d = 0; d < p.Dv; ++d) o[d] = index < 0 ? 0.0 : row.v(index)[d];
  if (p.row_max) static_cast<double*>(p.row_max)[row.stat()] = m;
  if (p.row_sum) static_cast<double*>(p.row_sum)[row.stat()] = l;
}

// Adds the row's part to dk and dv, and sets its dq.
void hard_backward_row(const HardAttentionGradParams& hp, const Row& row, double* scores) {
  const AttentionParams& p = hp.forward;
  double* dq = row_of(static_cast<double*>(hp.dq), hp.dq_stride, row.b, row.hq, row.i);
  for (int64_t d = 0; d < p.D; ++d) dq[d] = 0.0;
  const int64_t index = hp.index[row.stat()];
  if (hp.d_o && index >= 0) {
    const double* d_o = row_of(static_cast<const double*>(hp.d_o), hp.d_o_stride, row.b, row.hq, row.i);
    add_scaled(row_of(static_cast<double*>(hp.dv), hp.dv_stride, row.b, row.hkv, index), 1.0, d_o, p.Dv);
  }
  const double l = static_cast<const double*>(p.row_sum)[row.stat()];
  if (!hp.d_log_prob || l == 0.0) return;
  const double m = static_cast<const double*>(p.row_max)[row.stat()];
  const double d_log_prob = static_cast<const double*>(hp.d_log_prob)[row.stat()];
  row.compute_scores(scores, nullptr);
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double score = scores[j - row.begin];
    if (is_hidden(score)) continue;
    const double ds = d_log_prob * ((j == index ? 1.0 : 0.0) - std::exp(score - m) / l);
    add_scaled(dq, p.scale * ds, row.k(j), p.D);
    add_scaled(row_of(static_cast<double*>(hp.dk), hp.dk_stride, row.b, row.hkv, j), p.scale * ds, row.q(), p.D);
  }
}

}  // namespace

void plain_hard_forward_f64(const HardAttentionParams& params, const Parallel& parallel) {
  for_each_row(params.attention, parallel, [&](const Row& row, double* scores) { hard_row(params, row, scores); });
}

// One task owns a KV head, whose query heads add into the same dk and dv.
void plain_hard_backward_f64(const HardAttentionGradParams& params, const Parallel& parallel) {
  const AttentionParams& p = params.forward;
  const int64_t group = p.Hkv == 0 ? 0 : p.Hq / p.Hkv;
  const int64_t tasks = p.B * p.Hkv;
  const int workers = worker_count(parallel, tasks);
  std::vector<double> scratch(static_cast<size_t>(workers) * static_cast<size_t>(p.Lk));
  for_each_task(parallel, workers, tasks, [&](int64_t task, int worker) {
    const int64_t b = task / p.Hkv, hkv = task % p.Hkv;
    zero_rows(static_cast<double*>(params.dk), params.dk_stride, b, hkv, p.Lk, p.D);
    zero_rows(static_cast<double*>(params.dv), params.dv_stride, b, hkv, p.Lk, p.Dv);
    for (int64_t hq = hkv * group; hq < (hkv + 1) * group; ++hq) {
      for (int64_t i = 0; i < p.Lq; ++i) {
        hard_backward_row(params, Row(p, b, hq, i), scratch.data() + worker * p.Lk);
      }
    }
  });
}

}  // namespace fastattn::cpu
