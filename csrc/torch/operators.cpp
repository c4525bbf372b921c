#include "torch/operators.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "torch/attention.h"

namespace {

using fastattn::AttentionArguments;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The argument lists below repeat the schemas', which TORCH_BOX matches by position.
std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const OptionalTensor& bias, const OptionalTensor& mask,
                                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                     const OptionalTensor& kv_lengths, const OptionalTensor& rng_state,
                                                     int64_t causal, int64_t window_left, int64_t window_right,
                                                     std::optional<double> scale, double softcap, double dropout_p,
                                                     bool save_stats) {
  const AttentionArguments arguments{q,     k,          v,         bias,   mask,        alibi_slopes,
                                     sinks, kv_lengths, rng_state, causal, window_left, window_right,
                                     scale, softcap,    dropout_p};
  return fastattn::attention_forward(arguments, save_stats);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& stats, const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal,
    int64_t window_left, int64_t window_right, std::optional<double> scale, double softcap, double dropout_p,
    bool need_d_bias, bool need_d_sinks) {
  const AttentionArguments arguments{q,     k,          v,         bias,   mask,        alibi_slopes,
                                     sinks, kv_lengths, rng_state, causal, window_left, window_right,
                                     scale, softcap,    dropout_p};
  return fastattn::attention_backward({arguments, d_o, d_lse, o, stats, need_d_bias, need_d_sinks});
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
                     const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                     const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal,
                     int64_t window_left, int64_t window_right, std::optional<double> scale, double softcap,
                     double dropout_p, std::string device) {
  fastattn::check_attention({q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, causal, window_left,
                             window_right, scale, softcap, dropout_p},
                            device == "cuda");
}

}  // namespace

namespace fastattn {

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_forward", TORCH_BOX(&::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&::attention_backward));
  m.impl("_check_attention", TORCH_BOX(&::check_attention));
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace fastattn
