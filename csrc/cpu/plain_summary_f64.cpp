// The summary of attention weights in float64, row by row; core/params.h has the formulas.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/plain.h"
#include "cpu/plain_rows.h"

namespace fastattn::cpu {
namespace {

using plain::for_each_row;
using plain::for_each_task;
using plain::is_hidden;
using plain::kMinusInfinity;
using plain::Row;
using plain::worker_count;

// Row maximum and sum, the sink's included. m = -inf: the row sees nothing.
struct Statistics {
  double m = kMinusInfinity, l = 0.0;
  bool sees_nothing() const { return m == kMinusInfinity; }
};

Statistics statistics_of(const Row& row, const double* scores) {
  Statistics s;
  for (int64_t j = row.begin; j < row.end; ++j) {
    if (!(scores[j - row.begin] <= s.m)) s.m = scores[j - row.begin];  // written so that a NaN gets through
  }
  if (s.sees_nothing()) return s;
  if (row.sink() > s.m) s.m = row.sink();
  if (row.p.sinks) s.l = std::exp(row.sink() - s.m);
  for (int64_t j = row.begin; j < row.end; ++j) {
    if (!is_hidden(scores[j - row.begin])) s.l += std::exp(scores[j - row.begin] - s.m);
  }
  return s;
}

// -p log p of a score.
double entropy_term(const Statistics& s, double score) {
  const double weight = std::exp(score - s.m) / s.l;
  return weight == 0.0 ? 0.0 : weight * (std::log(s.l) - (score - s.m));
}

void write_top(const SummaryParams& sp, const Row& row, const double* scores, const Statistics& s) {
  const auto comes_first = [&](int64_t a, int64_t b) {
    const double x = scores[a - row.begin], y = scores[b - row.begin];
    return x > y || (x == y && a < b);
  };
  // The first keys so far, in order. Not on the heap: an exception on a worker's thread would end the process.
  int64_t keys[kMaxTopK];
  int64_t found = 0;
  for (int64_t j = row.begin; j < row.end; ++j) {
    const double score = scores[j - row.begin];
    if (is_hidden(score) || std::isnan(score)) continue;
    if (found == sp.top_k) {
      if (!comes_first(j, keys[found - 1])) continue;
      --found;
    }
    int64_t* const end = keys + found;
    int64_t* const place = std::upper_bound(keys, end, j, comes_first);
    std::copy_backward(place, end, end + 1);
    *place = j;
    ++found;
  }
  for (int64_t t = 0; t < sp.top_k; ++t) {
    const int64_t at = row.stat() * sp.top_k + t;
    const double weight = t < found ? std::exp(scores[keys[t] - row.begin] - s.m) : 0.0;
    if (sp.top_weights) static_cast<double*>(sp.top_weights)[at] = s.sees_nothing() ? 0.0 : weight / s.l;
    if (sp.top_index) sp.top_index[at] = t < found ? keys[t] : -1;
  }
}

void summary_row(const SummaryParams& sp, const Row& row, double* scores) {
  const AttentionParams& p = sp.attention;
  row.compute_scores(scores, nullptr);
  const Statistics s = statistics_of(row, scores);
  double entropy = 0.0, largest = kMinusInfinity;
  if (!s.sees_nothing()) {
    for (int64_t j = row.begin; j < row.end; ++j) {
      const double score = scores[j - row.begin];
      if (is_hidden(score)) continue;
      entropy += entropy_term(s, score);
      if (!(score <= largest)) largest = score;
    }
    if (p.sinks && row.sink() != kMinusInfinity) entropy += entropy_term(s, row.sink());
  }
  const int64_t at = row.stat();
  if (sp.entropy) static_cast<double*>(sp.entropy)[at] = entropy;
  if (sp.max_weight) static_cast<double*>(sp.max_weight)[at] = s.sees_nothing() ? 0.0 : std::exp(largest - s.m) / s.l;
  if (p.lse) static_cast<double*>(p.lse)[at] = s.sees_nothing() ? kMinusInfinity : s.m + std::log(s.l);
  if (p.row_max) static_cast<double*>(p.row_max)[at] = s.m;
  if (p.row_sum) static_cast<double*>(p.row_sum)[at] = s.l;
  if (sp.top_k > 0) write_top(sp, row, scores, s);
}

void add_mass(const SummaryParams& sp, const Row& row, double* scores, double* mass) {
  const int64_t* stride = sp.row_mask_stride;
  if (sp.row_mask && sp.row_mask[row.b * stride[0] + row.hq * stride[1] + row.i * stride[2]] == 0) return;
  row.compute_scores(scores, nullptr);
  const Statistics s = statistics_of(row, scores);
  for (int64_t j = row.begin; j < row.end; ++j) {
    if (!is_hidden(scores[j - row.begin])) mass[j] += std::exp(scores[j - row.begin] - s.m) / s.l;
  }
}

}  // namespace

void plain_summary_f64(const SummaryParams& params, const Parallel& parallel) {
  const AttentionParams& p = params.attention;
  for_each_row(p, parallel, [&](const Row& row, double* scores) { summary_row(params, row, scores); });
  if (!params.key_mass) return;
  // One task owns a head.
  const int64_t heads = p.B * p.Hq;
  const int workers = worker_count(parallel, heads);
  std::vector<double> scratch(static_cast<size_t>(workers) * static_cast<size_t>(p.Lk));
  for_each_task(parallel, workers, heads, [&](int64_t head, int worker) {
    double* mass = static_cast<double*>(params.key_mass) + head * p.Lk;
    std::fill(mass, mass + p.Lk, 0.0);
    for (int64_t i = 0; i < p.Lq; ++i) {
      add_mass(params, Row(p, head / p.Hq, head % p.Hq, i), scratch.data() + worker * p.Lk, mass);
    }
  });
}

}  // namespace fastattn::cpu
