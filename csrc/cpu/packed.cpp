#include "cpu/packed.h"

#include <algorithm>
#include <limits>

#include "core/sequence.h"
#include "cpu/work.h"

namespace fastattn::cpu {
namespace {

int64_t statistic_bytes(const AttentionParams& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }

const void* moved(const void* pointer, int64_t bytes) {
  return pointer == nullptr ? nullptr : static_cast<const char*>(pointer) + bytes;
}
void* moved(void* pointer, int64_t bytes) { return pointer == nullptr ? nullptr : static_cast<char*>(pointer) + bytes; }

// Sequences in the order of their work, the most first; equal ones in their own order.
std::vector<int64_t> by_work(const AttentionParams& p) {
  std::vector<int64_t> work(static_cast<size_t>(p.B)), order(static_cast<size_t>(p.B));
  AttentionParams one = p;
  one.kv_lengths = nullptr;
  for (int64_t b = 0; b < p.B; ++b) {
    const PackedSequence s = packed_sequence(p, b);
    one.Lq = s.rows;
    one.Lk = s.keys;
    work[static_cast<size_t>(b)] = visible_pairs(mask_geometry(one, 0));
    order[static_cast<size_t>(b)] = b;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return work[static_cast<size_t>(x)] > work[static_cast<size_t>(y)]; });
  return order;
}

AttentionParams problem_of(const AttentionParams& p, int64_t b) {
  const PackedSequence s = packed_sequence(p, b);
  const int64_t element = element_bytes(p.dtype), statistic = statistic_bytes(p);
  AttentionParams one = p;
  one.B = 1;
  one.Lq = s.rows;
  one.Lk = s.keys;
  one.first_batch = b;
  one.cu_seqlens_q = one.cu_seqlens_k = nullptr;
  one.q = moved(p.q, s.first_row * p.q_stride[2] * element);
  one.k = moved(p.k, s.first_key * p.k_stride[2] * element);
  one.v = moved(p.v, s.first_key * p.v_stride[2] * element);
  one.o = moved(p.o, s.first_row * p.o_stride[2] * element);
  one.bias = moved(p.bias, b * p.bias_stride[0] * element_bytes(p.bias_dtype));
  if (p.mask != nullptr) one.mask = p.mask + b * p.mask_stride[0];
  one.alibi_slopes = moved(p.alibi_slopes, b * p.alibi_stride[0] * statistic);
  one.lse = moved(p.lse, s.first_row * statistic);
  one.row_max = moved(p.row_max, s.first_row * statistic);
  one.row_sum = moved(p.row_sum, s.first_row * statistic);
  return one;
}

template <class Real>
void fill_statistic(void* statistic, const AttentionParams& p, int64_t first, Real value) {
  if (statistic == nullptr) return;
  for (int64_t h = 0; h < p.Hq; ++h) {
    Real* head = static_cast<Real*>(statistic) + h * p.packed_rows;
    std::fill(head + first, head + p.packed_rows, value);
  }
}

template <class Real>
void clear_statistics(const AttentionParams& p, int64_t first) {
  constexpr Real kMinusInfinity = -std::numeric_limits<Real>::infinity();
  fill_statistic(p.lse, p, first, kMinusInfinity);
  fill_statistic(p.row_max, p, first, kMinusInfinity);
  fill_statistic(p.row_sum, p, first, Real(0));
}

int64_t rows_of_sequences(const AttentionParams& p) { return clamp_i64(p.cu_seqlens_q[p.B], 0, p.packed_rows); }
int64_t keys_of_sequences(const AttentionParams& p) { return clamp_i64(p.cu_seqlens_k[p.B], 0, p.packed_keys); }

}  // namespace

std::vector<AttentionParams> packed_problems(const AttentionParams& params) {
  std::vector<AttentionParams> problems;
  problems.reserve(static_cast<size_t>(params.B));
  for (const int64_t b : by_work(params)) problems.push_back(problem_of(params, b));
  return problems;
}

std::vector<AttentionGradParams> packed_problems(const AttentionGradParams& params) {
  const AttentionParams& p = params.forward;
  const int64_t element = element_bytes(p.dtype), statistic = statistic_bytes(p);
  std::vector<AttentionGradParams> problems;
  problems.reserve(static_cast<size_t>(p.B));
  for (const int64_t b : by_work(p)) {
    const PackedSequence s = packed_sequence(p, b);
    AttentionGradParams one = params;
    one.forward = problem_of(p, b);
    one.d_o = moved(params.d_o, s.first_row * params.d_o_stride[2] * element);
    one.d_lse = moved(params.d_lse, s.first_row * statistic);
    one.dq = moved(params.dq, s.first_row * params.dq_stride[2] * element);
    one.dk = moved(params.dk, s.first_key * params.dk_stride[2] * element);
    one.dv = moved(params.dv, s.first_key * params.dv_stride[2] * element);
    one.d_bias = moved(params.d_bias, b * params.d_bias_stride[0] * statistic);
    problems.push_back(one);
  }
  return problems;
}

void clear_rows_of_no_sequence(const AttentionParams& p) {
  const int64_t first = rows_of_sequences(p);
  zero_rows(p.dtype, p.o, p.o_stride, 1, p.Hq, first, p.packed_rows, p.Dv);
  if (p.dtype == DType::kFloat64) {
    clear_statistics<double>(p, first);
  } else {
    clear_statistics<float>(p, first);
  }
}

void clear_rows_of_no_sequence(const AttentionGradParams& params) {
  const AttentionParams& p = params.forward;
  const int64_t first_key = keys_of_sequences(p);
  zero_rows(p.dtype, params.dq, params.dq_stride, 1, p.Hq, rows_of_sequences(p), p.packed_rows, p.D);
  zero_rows(p.dtype, params.dk, params.dk_stride, 1, p.Hkv, first_key, p.packed_keys, p.D);
  zero_rows(p.dtype, params.dv, params.dv_stride, 1, p.Hkv, first_key, p.packed_keys, p.Dv);
}

}  // namespace fastattn::cpu
