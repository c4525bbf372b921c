// The operators of torch.ops.fastattn: schemas, and their CPU implementations. Autograd and the shape rules for
// tracing ("fakes") are registered in fastattn/_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "torch/attention.h"
#include "torch/tools.h"

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
                     double dropout_p) {
  fastattn::check_attention({q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, causal, window_left,
                             window_right, scale, softcap, dropout_p});
}

}  // namespace

STABLE_TORCH_LIBRARY(fastattn, m) {
  m.def(
      "attention_forward("
      "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? kv_lengths, Tensor? rng_state, int causal, int window_left, int window_right, float? scale, "
      "float softcap, float dropout_p, bool save_stats) -> (Tensor o, Tensor lse, Tensor stats)");
  m.def(
      "attention_backward("
      "Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor stats, "
      "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? kv_lengths, Tensor? rng_state, "
      "int causal, int window_left, int window_right, float? scale, float softcap, float dropout_p, "
      "bool need_d_bias, bool need_d_sinks) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_bias, Tensor d_sinks)");
  m.def(
      "_check_attention("
      "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? kv_lengths, Tensor? rng_state, int causal, int window_left, int window_right, float? scale, "
      "float softcap, float dropout_p) -> ()");
  m.def("dropout_mask(Tensor rng_state, int B, int H, int Lq, int Lk, float p) -> Tensor");
  m.def("_set_isa(str name) -> ()");
  m.def("_isa() -> str");
  m.def("_supported_isas() -> str");
  m.def("_measure_peak(str dtype, int threads) -> float");
  m.def("_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("_check_attention", TORCH_BOX(&check_attention));
  m.impl("dropout_mask", TORCH_BOX(&fastattn::dropout_mask));
}

// Operators without a tensor argument have no device to be dispatched on.
STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&fastattn::set_isa));
  m.impl("_isa", TORCH_BOX(&fastattn::isa));
  m.impl("_supported_isas", TORCH_BOX(&fastattn::supported_isas));
  m.impl("_measure_peak", TORCH_BOX(&fastattn::measure_peak));
  m.impl("_build_info", TORCH_BOX(&fastattn::build_info));
}
