// The operators of torch.ops.fastattn: all schemas, also of what _C_cuda implements, and the CPU's implementations.
// Autograd and the shape rules for tracing ("fakes") are registered in fastattn/_autograd.py, beside each function.
#include <torch/csrc/stable/library.h>

#include "torch/operators.h"
#include "torch/tools.h"

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
      "float softcap, float dropout_p, str device) -> ()");
  m.def(
      "varlen_attention_forward("
      "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? bias, Tensor? mask, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, int max_seqlen_q, int max_seqlen_k, int causal, "
      "int window_left, int window_right, float? scale, float softcap, float dropout_p, bool save_stats) "
      "-> (Tensor o, Tensor lse, Tensor stats)");
  m.def(
      "varlen_attention_backward("
      "Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor stats, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, "
      "int max_seqlen_q, int max_seqlen_k, int causal, int window_left, int window_right, float? scale, "
      "float softcap, float dropout_p, bool need_d_bias, bool need_d_sinks) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor d_bias, Tensor d_sinks)");
  m.def(
      "_check_varlen_attention("
      "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? bias, Tensor? mask, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, int max_seqlen_q, int max_seqlen_k, int causal, "
      "int window_left, int window_right, float? scale, float softcap, float dropout_p, str device) -> ()");
  m.def(
      "additive_attention_forward("
      "Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, Tensor? kv_lengths, Tensor? rng_state, int causal, "
      "float dropout_p, bool save_stats) -> (Tensor o, Tensor lse, Tensor stats)");
  m.def(
      "additive_attention_backward("
      "Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor w, Tensor o, Tensor stats, Tensor? mask, "
      "Tensor? kv_lengths, Tensor? rng_state, int causal, float dropout_p) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dw)");
  m.def(
      "_check_additive_attention("
      "Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, Tensor? kv_lengths, Tensor? rng_state, int causal, "
      "float dropout_p, str device) -> ()");
  m.def(
      "hard_attention_forward("
      "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? kv_lengths, Tensor? rng_state, int causal, "
      "int window_left, int window_right, float? scale, bool save_stats) "
      "-> (Tensor o, Tensor index, Tensor log_prob, Tensor stats)");
  m.def(
      "hard_attention_backward("
      "Tensor? d_o, Tensor? d_log_prob, Tensor q, Tensor k, Tensor v, Tensor index, Tensor stats, Tensor? mask, "
      "Tensor? kv_lengths, int causal, int window_left, int window_right, float? scale) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "_check_hard_attention("
      "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? kv_lengths, Tensor? rng_state, int causal, "
      "int window_left, int window_right, float? scale, str device) -> ()");
  m.def(
      "attention_summary("
      "Tensor q, Tensor k, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? kv_lengths, "
      "Tensor? row_mask, int causal, int window_left, int window_right, float? scale, float softcap, int top_k, "
      "bool need_mass) -> (Tensor entropy, Tensor max_weight, Tensor top_weights, Tensor top_index, Tensor key_mass, "
      "Tensor lse)");
  m.def(
      "_check_attention_summary("
      "Tensor q, Tensor k, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? kv_lengths, "
      "Tensor? row_mask, int causal, int window_left, int window_right, float? scale, float softcap, int top_k, "
      "bool need_mass, str device) -> ()");
  m.def(
      "attention_with_kv_cache("
      "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor cache_lengths, "
      "Tensor? block_table, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? alibi_slopes, Tensor? sinks, bool rotary_interleaved, int causal, int window_left, int window_right, "
      "float? scale, float softcap) -> (Tensor o, Tensor lse)");
  m.def(
      "_check_attention_with_kv_cache("
      "Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, Tensor cache_lengths, Tensor? block_table, "
      "Tensor? k_scale, Tensor? v_scale, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? alibi_slopes, Tensor? sinks, "
      "bool rotary_interleaved, int causal, int window_left, int window_right, float? scale, float softcap, "
      "str device) -> ()");
  m.def("dropout_mask(Tensor rng_state, int B, int H, int Lq, int Lk, float p) -> Tensor");
  m.def("_set_isa(str name) -> ()");
  m.def("_isa() -> str");
  m.def("_all_isas() -> str");
  m.def("_supported_isas() -> str");
  m.def("_measure_peak(str dtype, int threads) -> float");
  m.def("_sum_words(Tensor x, Tensor y) -> int");
  m.def("_build_info() -> str");
  m.def("_cuda_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  fastattn::register_operators(m);
  m.impl("_sum_words", TORCH_BOX(&fastattn::sum_words));
}

// Operators without a tensor argument have no device to be dispatched on.
STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&fastattn::set_isa));
  m.impl("_isa", TORCH_BOX(&fastattn::isa));
  m.impl("_all_isas", TORCH_BOX(&fastattn::all_isas));
  m.impl("_supported_isas", TORCH_BOX(&fastattn::supported_isas));
  m.impl("_measure_peak", TORCH_BOX(&fastattn::measure_peak));
  m.impl("_build_info", TORCH_BOX(&fastattn::build_info));
}
