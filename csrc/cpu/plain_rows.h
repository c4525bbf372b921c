// What the float64 files share: a query row with its scores written out in full, and threads that work on rows.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "core/mask.h"
#include "core/philox.h"
#include "core/score.h"
#include "core/sequence.h"
#include "cpu/parallel.h"

namespace fastattn::cpu::plain {

inline constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
inline constexpr int64_t kRowsPerTask = 16;

// Calls body(task, worker) for every task, each worker taking the next task that nobody has taken yet.
template <class Body>
void for_each_task(const Parallel& parallel, int workers, int64_t tasks, Body body) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t tasks = 0;
    Body* body = nullptr;
  } shared;
  shared.tasks = tasks;
  shared.body = &body;
  parallel.run(
      parallel, workers,
      [](void* arg, int worker) {
        Shared& s = *static_cast<Shared*>(arg);
        for (int64_t task = s.next++; task < s.tasks; task = s.next++) (*s.body)(task, worker);
      },
      &shared);
}

inline int worker_count(const Parallel& parallel, int64_t tasks) {
  return static_cast<int>(clamp_i64(tasks, 1, max_i64(parallel.threads, 1)));
}

// The tensors are addressed by (batch, head, row) strides; the last dimension is contiguous.
template <class T>
T* row_of(T* base, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t row) {
  return base + b * stride[0] + h * stride[1] + row * stride[2];
}

// Eight partial sums, for without them every addition waits for the one before it.
inline double dot(const double* x, const double* y, int64_t n) {
  double partial[8] = {};
  int64_t d = 0;
  for (; d + 8 <= n; d += 8) {
    for (int lane = 0; lane < 8; ++lane) partial[lane] += x[d + lane] * y[d + lane];
  }
  double sum =
      ((partial[0] + partial[4]) + (partial[2] + partial[6])) + ((partial[1] + partial[5]) + (partial[3] + partial[7]));
  for (; d < n; ++d) sum += x[d] * y[d];
  return sum;
}

inline double additive_score(const double* w, const double* q, const double* k, int64_t n) {
  double sum = 0.0;
  for (int64_t d = 0; d < n; ++d) sum += w[d] * std::tanh(q[d] + k[d]);
  return sum;
}

inline void add_scaled(double* y, double factor, const double* x, int64_t n) {
  for (int64_t d = 0; d < n; ++d) y[d] += factor * x[d];
}

// One query row: where it is, and the keys [begin, end) that its geometry shows it.
struct Row {
  // widened: memory for a row out of an int8 cache.
  Row(const AttentionParams& params, int64_t b_, int64_t hq_, int64_t i_, double* widened_ = nullptr)
      : p(params),
        geometry(mask_geometry(params, b_)),
        b(b_),
        hq(hq_),
        hkv(hq_ / (params.Hq / params.Hkv)),
        i(i_),
        widened(widened_) {
    begin = lo(geometry, i);
    end = max_i64(begin, hi(geometry, i));
  }

  const double* q() const { return row_of(static_cast<const double*>(p.q), p.q_stride, b, hq, i); }
  // Until the next call of k or v.
  const double* k(int64_t j) const { return cached(p.k, p.k_stride, p.k_scale, p.k_scale_stride, p.D, j); }
  const double* w() const { return static_cast<const double*>(p.w) + hq * p.w_stride; }
  const double* v(int64_t j) const { return cached(p.v, p.v_stride, p.v_scale, p.v_scale_stride, p.Dv, j); }
  int64_t stat() const { return stat_index(p, b, hq, i); }  // index into lse, row_max and row_sum
  double sink() const { return p.sinks ? static_cast<const double*>(p.sinks)[hq] : kMinusInfinity; }

  bool mask_keeps(int64_t j) const {
    const int64_t* stride = p.mask_stride;
    return !p.mask || p.mask[b * stride[0] + hq * stride[1] + i * stride[2] + j * stride[3]] != 0;
  }

  const double* cached(const void* rows, const int64_t (&stride)[3], const float* scales,
                       const int64_t (&scale_stride)[3], int64_t columns, int64_t j) const {
    const KeyRun run = key_run(p, b, j, j + 1);
    if (scales == nullptr) return row_of(static_cast<const double*>(rows), stride, run.batch, hkv, run.row);
    const int8_t* numbers = row_of(static_cast<const int8_t*>(rows), stride, run.batch, hkv, run.row);
    const double scale = static_cast<double>(*row_of(scales, scale_stride, run.batch, hkv, run.row));
    for (int64_t c = 0; c < columns; ++c) widened[c] = scale * static_cast<double>(numbers[c]);
    return widened;
  }

  // What is added to the capped score of key j.
  double addend(int64_t j) const {
    double sum = 0.0;
    if (p.bias) {
      const int64_t* stride = p.bias_stride;
      const int64_t at = b * stride[0] + hq * stride[1] + i * stride[2] + j * stride[3];
      sum += p.bias_dtype == DType::kFloat64 ? static_cast<const double*>(p.bias)[at]
                                             : static_cast<double>(static_cast<const float*>(p.bias)[at]);
    }
    if (p.alibi_slopes) {
      const double slope = static_cast<const double*>(p.alibi_slopes)[b * p.alibi_stride[0] + hq * p.alibi_stride[1]];
      sum -= slope * static_cast<double>(alibi_distance(geometry, i, j));
    }
    return sum;
  }

  // The factor z_j of the weight of key j.
  double dropout_factor(int64_t j) const {
    if (p.dropout_p <= 0.0) return 1.0;
    if (p.dropout_p >= 1.0) return 0.0;
    const bool kept = dropout_keeps(p.seed, p.offset, dropout_head(p, b, hq), i, j, dropout_threshold(p.dropout_p));
    return kept ? 1.0 / (1.0 - p.dropout_p) : 0.0;
  }

  // scores[j - begin] for the keys in [begin, end), -inf for hidden ones; and where wanted the softcap's derivative.
  void compute_scores(double* scores, double* cap_derivative) const {
    for (int64_t j = begin; j < end; ++j) {
      if (!mask_keeps(j)) {
        scores[j - begin] = kMinusInfinity;
        continue;
      }
      double score = p.w ? additive_score(w(), q(), k(j), p.D) : p.scale * dot(q(), k(j), p.D);
      double derivative = 1.0;
      if (p.softcap > 0.0) {
        const double t = std::tanh(score / p.softcap);
        score = softcap_value(t, p.softcap);
        derivative = softcap_derivative(t);
      }
      scores[j - begin] = score + addend(j);
      if (cap_derivative) cap_derivative[j - begin] = derivative;
    }
  }

  const AttentionParams& p;
  MaskGeometry geometry;
  int64_t b, hq, hkv, i;
  double* widened;
  int64_t begin, end;
};

inline bool is_hidden(double score) { return score == kMinusInfinity; }

inline void zero_rows(double* base, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    double* x = row_of(base, stride, b, h, row);
    for (int64_t d = 0; d < width; ++d) x[d] = 0.0;
  }
}

// Calls body(row, scratch for Lk scores) for every query row.
template <class Body>
void for_each_row(const AttentionParams& p, const Parallel& parallel, Body body) {
  const int64_t row_blocks = (p.Lq + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t tasks = p.B * p.Hq * row_blocks;
  if (tasks == 0) return;
  const int workers = worker_count(parallel, tasks);
  const int64_t widened = p.k_scale ? max_i64(p.D, p.Dv) : 0;
  std::vector<double> scratch(static_cast<size_t>(workers) * static_cast<size_t>(p.Lk + widened));
  for_each_task(parallel, workers, tasks, [&](int64_t task, int worker) {
    const int64_t b = task / row_blocks / p.Hq, hq = task / row_blocks % p.Hq;
    const int64_t first = task % row_blocks * kRowsPerTask;
    for (int64_t i = first; i < min_i64(first + kRowsPerTask, p.Lq); ++i) {
      double* scores = scratch.data() + worker * (p.Lk + widened);
      body(Row(p, b, hq, i, scores + p.Lk), scores);
    }
  });
}

}  // namespace fastattn::cpu::plain
