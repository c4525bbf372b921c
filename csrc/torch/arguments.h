// The arguments of the attention operators as torch hands them over, and the checks that every one of them passes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/params.h"

namespace fastattn {

using torch::stable::Tensor;

// Shapes: see core/params.h; bias and mask may lack leading dimensions, which then count as 1. alibi_slopes and sinks
// are of the accumulator type, rng_state is (seed, offset). w asks for additive scores.
struct AttentionArguments {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& alibi_slopes;
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& kv_lengths;
  const std::optional<Tensor>& rng_state;
  const std::optional<Tensor>& w;
  int64_t causal;
  int64_t window_left;
  int64_t window_right;
  std::optional<double> scale;
  double softcap;
  double dropout_p;
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

// Throw std::invalid_argument, before anything is allocated, when an argument breaks a rule. What is returned has
// sizes, dtypes and numbers filled in, and no pointer yet. for_cuda: with the limits of the CUDA kernels; the tensors
// may be stand-ins on the CPU.
AttentionParams check_attention(const AttentionArguments& arguments, bool for_cuda);
AttentionParams check_attention_grad(const AttentionGradArguments& arguments, bool for_cuda);
AttentionParams check_hard_attention_grad(const HardAttentionGradArguments& arguments, bool for_cuda);
AttentionParams check_summary(const SummaryArguments& arguments, bool for_cuda);
void check_dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p);

}  // namespace fastattn
