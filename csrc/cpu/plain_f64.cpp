// Attention in float64, row by row, forward and backward; core/params.h has the formula.
//
// A row's scores are written out in full (O(Lk) scratch for each worker), so that this file is as close to the textbook
// as it can be: the tiled kernels are tested against it. For row i, with p = softmax(s), z = keep / (1 - dropout_p):
//
//   o     = sum_j z_j p_j v_j                     lse = m + log(l)
//   dp_j  = z_j (do . v_j)                        delta = sum_j p_j dp_j = do . o
//   ds_j  = p_j (dp_j - delta + d_lse)            d_sink = p_sink (-delta + d_lse)         d_bias_j = ds_j
//   dq    = scale sum_j ds_j cap'_j k_j           dk_j += scale ds_j cap'_j q              dv_j += z_j p_j do
//
// and with additive scores, t = tanh(q + k_j):
//
//   dq    = w sum_j ds_j cap'_j (1 - t^2)         dk_j += w ds_j cap'_j (1 - t^2)          dw += sum_j ds_j cap'_j t
//
// A key is left out (never read, never multiplied by a zero) when the geometry, the key length or the boolean mask
// hides it. A score of -inf, which only an infinite bias brings about, hides its key from everything that follows as
// well.
#include "cpu/plain.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/plain_rows.h"

namespace fastattn::cpu {
namespace {

using plain::add_scaled;
using plain::dot;
using plain::for_each_row;
using plain::for_each_task;
using plain::is_hidden;
using plain::kMinusInfinity;
using plain::Row;
using plain::row_of;
using plain::worker_count;
using plain::zero_rows;

void forward_row(const Row& row, double* scores) {
  const AttentionParams& p = row.p;
  row.compute_scores(scores, nullptr);

  double m = kMinusInfinity;
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double score = scores[j - row.begin];
    if (!(score <= m)) m = score;  // written so that a NaN gets through
  }
  // m = -inf means that the row sees nothing; a sink alone does not change that.
  const bool sees_nothing = is_hidden(m);
  double l = 0.0;
  if (!sees_nothing) {
    if (row.sink() > m) m = row.sink();
    if (p.sinks) l = std::exp(row.sink() - m);
  }

  double* o = row_of(static_cast<double*>(p.o), p.o_stride, row.b, row.hq, row.i);
  for (int64_t d = 0; d < p.Dv; ++d) o[d] = 0.0;
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double score = scores[j - row.begin];
    if (is_hidden(score)) continue;
    const double weight = std::exp(score - m);
    l += weight;
    const double factor = row.dropout_factor(j);
    if (factor != 0.0) add_scaled(o, weight * factor, row.v(j), p.Dv);
  }
  if (!sees_nothing) {
    for (int64_t d = 0; d < p.Dv; ++d) o[d] /= l;
  }

  if (p.lse) static_cast<double*>(p.lse)[row.stat()] = sees_nothing ? kMinusInfinity : m + std::log(l);
  if (p.row_max) static_cast<double*>(p.row_max)[row.stat()] = m;
  if (p.row_sum) static_cast<double*>(p.row_sum)[row.stat()] = l;
}

// What a gradient ds of w . tanh(q + k) adds to those of q, k and w.
void add_additive_gradient(double ds, const Row& row, int64_t j, double* dq, double* dk, double* dw) {
  const double *w = row.w(), *q = row.q(), *k = row.k(j);
  for (int64_t d = 0; d < row.p.D; ++d) {
    const double t = std::tanh(q[d] + k[d]);
    const double dx = ds * w[d] * (1.0 - t * t);
    dq[d] += dx;
    dk[d] += dx;
    dw[d] += ds * t;
  }
}

// One worker's memory.
struct BackwardScratch {
  double *scores, *cap_derivative;  // [Lk]
  double* dw;                       // [D], of one row
  static int64_t size(const AttentionParams& p) { return 2 * p.Lk + (p.w ? p.D : 0); }
  BackwardScratch(const AttentionParams& p, double* memory)
      : scores(memory), cap_derivative(memory + p.Lk), dw(memory + 2 * p.Lk) {}
};

// Adds the row's part to dk, dv, d_bias and dw, sets its dq, and returns its part of the sink's gradient.
double backward_row(const AttentionGradParams& g, const Row& row, const BackwardScratch& scratch, double* dw) {
  const AttentionParams& p = row.p;
  double* dq = row_of(static_cast<double*>(g.dq), g.dq_stride, row.b, row.hq, row.i);
  for (int64_t d = 0; d < p.D; ++d) dq[d] = 0.0;

  const double m = static_cast<const double*>(p.row_max)[row.stat()];
  const double l = static_cast<const double*>(p.row_sum)[row.stat()];
  if (l == 0.0) return 0.0;  // the row sees nothing

  const double* o = row_of(static_cast<const double*>(p.o), p.o_stride, row.b, row.hq, row.i);
  const double* d_o = row_of(static_cast<const double*>(g.d_o), g.d_o_stride, row.b, row.hq, row.i);
  const double d_lse = g.d_lse ? static_cast<const double*>(g.d_lse)[row.stat()] : 0.0;
  const double delta = dot(d_o, o, p.Dv);

  // A row's sum first: in one sum over all rows and keys, every addition would be rounded at the size of the whole.
  if (p.w) std::fill(scratch.dw, scratch.dw + p.D, 0.0);
  row.compute_scores(scratch.scores, scratch.cap_derivative);
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double score = scratch.scores[j - row.begin];
    if (is_hidden(score)) continue;
    const double weight = std::exp(score - m) / l;
    const double factor = row.dropout_factor(j);
    double dp = 0.0;
    if (factor != 0.0) {
      dp = factor * dot(d_o, row.v(j), p.Dv);
      double* dv = row_of(static_cast<double*>(g.dv), g.dv_stride, row.b, row.hkv, j);
      add_scaled(dv, weight * factor, d_o, p.Dv);
    }
    const double ds = weight * (dp - delta + d_lse);
    if (g.d_bias) {
      const int64_t* stride = g.d_bias_stride;
      static_cast<double*>(g.d_bias)[row.b * stride[0] + row.hq * stride[1] + row.i * stride[2] + j * stride[3]] += ds;
    }
    double* dk = row_of(static_cast<double*>(g.dk), g.dk_stride, row.b, row.hkv, j);
    if (p.w) {
      add_additive_gradient(ds * scratch.cap_derivative[j - row.begin], row, j, dq, dk, scratch.dw);
      continue;
    }
    const double dx = p.scale * ds * scratch.cap_derivative[j - row.begin];
    add_scaled(dq, dx, row.k(j), p.D);
    add_scaled(dk, dx, row.q(), p.D);
  }
  if (p.w) add_scaled(dw, 1.0, scratch.dw, p.D);
  return p.sinks ? std::exp(row.sink() - m) / l * (d_lse - delta) : 0.0;
}

void zero_bias_gradient(const AttentionGradParams& g) {
  const AttentionParams& p = g.forward;
  const int64_t sizes[4] = {p.B, p.Hq, p.Lq, p.Lk};
  int64_t extent[4];
  for (int dim = 0; dim < 4; ++dim) extent[dim] = g.d_bias_stride[dim] == 0 ? 1 : sizes[dim];
  const int64_t* stride = g.d_bias_stride;
  double* base = static_cast<double*>(g.d_bias);
  for (int64_t b = 0; b < extent[0]; ++b) {
    for (int64_t h = 0; h < extent[1]; ++h) {
      for (int64_t i = 0; i < extent[2]; ++i) {
        for (int64_t j = 0; j < extent[3]; ++j)
          base[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]] = 0.0;
      }
    }
  }
}

}  // namespace

void plain_forward_f64(const AttentionParams& params, const Parallel& parallel) {
  for_each_row(params, parallel, forward_row);
}

namespace {

// The gradients of one problem; adds to d_bias, d_sinks and dw. One task owns the heads that add into the same
// elements: the group of query heads of a KV head, and all the batches or all the heads as well where the bias is
// broadcast over them. A sum's order is then the program's, not the threads'.
void add_gradients(const AttentionGradParams& params, const Parallel& parallel) {
  const AttentionParams& p = params.forward;
  const int64_t group = p.Hkv == 0 ? 0 : p.Hq / p.Hkv;
  const bool joins_batches = params.d_bias && params.d_bias_stride[0] == 0;
  const bool joins_heads = params.d_bias && params.d_bias_stride[1] == 0;
  const int64_t batch_tasks = joins_batches ? min_i64(p.B, 1) : p.B;
  const int64_t head_tasks = joins_heads ? min_i64(p.Hkv, 1) : p.Hkv;
  const int64_t tasks = batch_tasks * head_tasks;
  const int workers = worker_count(parallel, tasks);
  std::vector<double> memory(static_cast<size_t>(workers * BackwardScratch::size(p)));
  std::vector<double> sink_parts(params.d_sinks ? static_cast<size_t>(p.B * p.Hq) : 0);
  std::vector<double> dw_parts(params.dw ? static_cast<size_t>(p.B * p.Hq * p.D) : 0);

  const auto backward_heads = [&](int64_t b, int64_t hkv, const BackwardScratch& scratch) {
    zero_rows(static_cast<double*>(params.dk), params.dk_stride, b, hkv, p.Lk, p.D);
    zero_rows(static_cast<double*>(params.dv), params.dv_stride, b, hkv, p.Lk, p.Dv);
    for (int64_t hq = hkv * group; hq < (hkv + 1) * group; ++hq) {
      double d_sink = 0.0;
      double* dw = dw_parts.data() + (params.dw ? (b * p.Hq + hq) * p.D : 0);
      for (int64_t i = 0; i < p.Lq; ++i) d_sink += backward_row(params, Row(p, b, hq, i), scratch, dw);
      if (params.d_sinks) sink_parts[static_cast<size_t>(b * p.Hq + hq)] = d_sink;
    }
  };
  for_each_task(parallel, workers, tasks, [&](int64_t task, int worker) {
    const BackwardScratch scratch(p, memory.data() + worker * BackwardScratch::size(p));
    const int64_t b0 = task / head_tasks, b1 = joins_batches ? p.B : b0 + 1;
    const int64_t h0 = task % head_tasks, h1 = joins_heads ? p.Hkv : h0 + 1;
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t hkv = h0; hkv < h1; ++hkv) backward_heads(b, hkv, scratch);
    }
  });

  if (params.dw) {
    const int64_t rows = p.w_stride == 0 ? 1 : p.Hq;
    for (int64_t head = 0; head < p.B * p.Hq; ++head) {
      add_scaled(static_cast<double*>(params.dw) + head % rows * p.D, 1.0, dw_parts.data() + head * p.D, p.D);
    }
  }
  if (params.d_sinks) {
    for (int64_t b = 0; b < p.B; ++b) {
      add_scaled(static_cast<double*>(params.d_sinks), 1.0, sink_parts.data() + b * p.Hq, p.Hq);
    }
  }
}

}  // namespace

void plain_backward_f64(const AttentionGradParams& params, const std::vector<AttentionGradParams>& problems,
                        const Parallel& parallel) {
  const AttentionParams& p = params.forward;
  if (params.d_bias) zero_bias_gradient(params);
  if (params.dw) std::fill_n(static_cast<double*>(params.dw), (p.w_stride == 0 ? 1 : p.Hq) * p.D, 0.0);
  if (params.d_sinks) std::fill_n(static_cast<double*>(params.d_sinks), p.Hq, 0.0);
  for (const AttentionGradParams& problem : problems) add_gradients(problem, parallel);
}

}  // namespace fastattn::cpu
