// The arguments of the attention operators as torch hands them over, and the checks that every one of them passes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "core/cache.h"
#include "core/params.h"

namespace fastattn {

using torch::stable::Tensor;

// Sizes of a tensor.
struct Shape {
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t n : sizes) size[dim++] = n;
  }
  int64_t size[4] = {};
  int64_t dim = 0;
};

// What messages say of one operator and not of the others.
struct OperatorTexts {
  const char* ranks;       // the numbers of dimensions that it takes
  const char* keys;        // who has the length of the keys
  const char* wide_heads;  // what else there is to call for head dimensions beyond the CUDA kernels'
  const char* many_keys;   // what to do with more keys than they take
};

inline const std::optional<Tensor> kNoTensor;

// Sequences packed one after the other: q, k and v are (total, H, D).
struct PackedArguments {
  const Tensor& cu_seqlens_q;  // (B + 1,), int32
  const Tensor& cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

// Shapes: see core/params.h; bias and mask may lack leading dimensions, which then count as 1. alibi_slopes and sinks
// are of the accumulator type, rng_state is (seed, offset). w asks for additive scores. References, so that whatever is
// put in has to outlive the arguments: an operator's parameters do, a temporary does not.
struct AttentionArguments {
  const OperatorTexts& texts;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& bias = kNoTensor;
  const std::optional<Tensor>& mask = kNoTensor;
  const std::optional<Tensor>& alibi_slopes = kNoTensor;
  const std::optional<Tensor>& sinks = kNoTensor;
  const std::optional<Tensor>& kv_lengths = kNoTensor;
  const std::optional<Tensor>& rng_state = kNoTensor;
  const PackedArguments* packed = nullptr;
  const Tensor* w = nullptr;  // no std::optional: the operators that have it at all require it
  int64_t causal = 0;
  int64_t window_left = kUnlimited;
  int64_t window_right = kUnlimited;
  std::optional<double> scale = std::nullopt;  // 1/sqrt(D)
  double softcap = 0.0;
  double dropout_p = 0.0;
};

// What the backward pass takes on top.
struct AttentionGradArguments {
  const AttentionArguments& forward;
  const Tensor& d_o;
  const std::optional<Tensor>& d_lse;
  const Tensor& o;
  const Tensor& stats;
  bool need_d_bias;
  bool need_d_sinks;
};

// In `attention`, a hard choice has none of bias, alibi_slopes, sinks, w, softcap and dropout_p.
struct HardAttentionGradArguments {
  const AttentionArguments& attention;
  const std::optional<Tensor>& d_o;
  const std::optional<Tensor>& d_log_prob;
  const Tensor& index;
  const Tensor& stats;
};

struct SummaryArguments {
  const AttentionArguments& attention;  // there are no values: k stands in for v
  const std::optional<Tensor>& row_mask;
  int64_t top_k;
  bool need_mass;
};

// A cache, to be appended to and attended over. Shapes: see core/cache.h and fastattn/_kv_cache.py.
struct KvCacheArguments {
  const AttentionArguments& attention;  // its k and v are the caches, and it has no kv_lengths
  const std::optional<Tensor>& k;       // what is appended; both or none
  const std::optional<Tensor>& v;
  const Tensor& cache_lengths;
  const std::optional<Tensor>& block_table;
  const std::optional<Tensor>& k_scale;  // int8 caches; both or none
  const std::optional<Tensor>& v_scale;
  const std::optional<Tensor>& rotary_cos;  // both or none
  const std::optional<Tensor>& rotary_sin;
  bool rotary_interleaved;
};
struct KvCacheParams {
  AttentionParams attention;
  CacheAppendParams append;
};

// Of o and its gradient, and of lse, row_max, row_sum and d_lse: in a padded batch, or packed.
Shape row_shape(const AttentionArguments& arguments, const AttentionParams& params);
Shape statistic_shape(const AttentionArguments& arguments, const AttentionParams& params);
Shape stats_shape(const AttentionArguments& arguments, const AttentionParams& params);  // row_max, and then row_sum

// Throw std::invalid_argument, before anything is allocated, when an argument breaks a rule. What is returned has
// sizes, dtypes and numbers filled in, and no pointer yet. for_cuda: with the limits of the CUDA kernels; the tensors
// may be stand-ins on the CPU.
AttentionParams check_attention(const AttentionArguments& arguments, bool for_cuda);
AttentionParams check_attention_grad(const AttentionGradArguments& arguments, bool for_cuda);
AttentionParams check_hard_attention_grad(const HardAttentionGradArguments& arguments, bool for_cuda);
AttentionParams check_summary(const SummaryArguments& arguments, bool for_cuda);
KvCacheParams check_kv_cache(const KvCacheArguments& arguments, bool for_cuda);
// The rest of the rules, which only real tensors keep or break: where they lie in memory and, on the CPU, the values
// of lengths and tables. After check_kv_cache, and before anything is written.
void check_kv_cache_contents(const KvCacheArguments& arguments, const KvCacheParams& params);
void check_dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p);

}  // namespace fastattn
