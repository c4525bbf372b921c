#include "torch/operators.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "torch/attention.h"

namespace {

using fastattn::AttentionArguments;
using fastattn::kNoTensor;
using fastattn::OperatorTexts;
using fastattn::PackedArguments;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOneRank = "attention takes four, (B, H, L, D)";
constexpr const char* kMergeParts = "cut k and v into parts and combine their results with merge_attention_states";
constexpr const char* kUseCpu = "move the tensors to the CPU with q.cpu(), where there is no limit";

constexpr OperatorTexts kAttention{.ranks = kOneRank,
                                   .keys = "k and v have",
                                   .wide_heads = "torch.nn.functional.scaled_dot_product_attention",
                                   .many_keys = kMergeParts};
constexpr OperatorTexts kVarlen{.ranks = "varlen_attention takes three, (total, H, D)",
                                .keys = "the longest sequence of k and v has",
                                .wide_heads = "torch.nn.functional.scaled_dot_product_attention",
                                .many_keys = kMergeParts};
constexpr OperatorTexts kAdditive{
    .ranks = "additive_attention takes four, (B, H, L, D), or for one head three, (B, L, D), in all of q, k and v",
    .keys = "k and v have",
    .wide_heads = "fastattn.reference.additive_attention",
    .many_keys = kMergeParts};
// A choice out of each part has no merge, nor has a summary.
constexpr OperatorTexts kHard{.ranks = kOneRank,
                              .keys = "k and v have",
                              .wide_heads = "fastattn.reference.log_probabilities, hard_choice and hard_attention",
                              .many_keys = kUseCpu};
constexpr OperatorTexts kSummary{
    .ranks = kOneRank, .keys = "k has", .wide_heads = "fastattn.reference.attention_summary", .many_keys = kUseCpu};

constexpr OperatorTexts kKvCache{
    .ranks = "attention_with_kv_cache takes four: (B, H, L, D), for a paged cache (pages, H, page_size, D)",
    .keys = "the cache has",
    .wide_heads = "torch.nn.functional.scaled_dot_product_attention",
    .many_keys = kUseCpu};

AttentionArguments attention_arguments(const OperatorTexts& texts, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const OptionalTensor& bias, const OptionalTensor& mask,
                                       const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                       const OptionalTensor& kv_lengths, const OptionalTensor& rng_state,
                                       int64_t causal, int64_t window_left, int64_t window_right,
                                       std::optional<double> scale, double softcap, double dropout_p) {
  return {.texts = texts,
          .q = q,
          .k = k,
          .v = v,
          .bias = bias,
          .mask = mask,
          .alibi_slopes = alibi_slopes,
          .sinks = sinks,
          .kv_lengths = kv_lengths,
          .rng_state = rng_state,
          .causal = causal,
          .window_left = window_left,
          .window_right = window_right,
          .scale = scale,
          .softcap = softcap,
          .dropout_p = dropout_p};
}

// The argument lists below repeat the schemas', which TORCH_BOX matches by position.
std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const OptionalTensor& bias, const OptionalTensor& mask,
                                                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                     const OptionalTensor& kv_lengths, const OptionalTensor& rng_state,
                                                     int64_t causal, int64_t window_left, int64_t window_right,
                                                     std::optional<double> scale, double softcap, double dropout_p,
                                                     bool save_stats) {
  const AttentionArguments arguments =
      attention_arguments(kAttention, q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, causal,
                          window_left, window_right, scale, softcap, dropout_p);
  return fastattn::attention_forward(arguments, save_stats);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& stats, const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal,
    int64_t window_left, int64_t window_right, std::optional<double> scale, double softcap, double dropout_p,
    bool need_d_bias, bool need_d_sinks) {
  const AttentionArguments arguments =
      attention_arguments(kAttention, q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, causal,
                          window_left, window_right, scale, softcap, dropout_p);
  const fastattn::AttentionGradients grads =
      fastattn::attention_backward({arguments, d_o, d_lse, o, stats, need_d_bias, need_d_sinks});
  return {grads.dq, grads.dk, grads.dv, grads.d_bias, grads.d_sinks};
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
                     const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                     const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal,
                     int64_t window_left, int64_t window_right, std::optional<double> scale, double softcap,
                     double dropout_p, std::string device) {
  const AttentionArguments arguments =
      attention_arguments(kAttention, q, k, v, bias, mask, alibi_slopes, sinks, kv_lengths, rng_state, causal,
                          window_left, window_right, scale, softcap, dropout_p);
  fastattn::check_attention(arguments, device == "cuda");
}

std::tuple<Tensor, Tensor, Tensor> varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                  const OptionalTensor& bias, const OptionalTensor& mask,
                                                  const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                                                  const OptionalTensor& rng_state, int64_t max_seqlen_q,
                                                  int64_t max_seqlen_k, int64_t causal, int64_t window_left,
                                                  int64_t window_right, std::optional<double> scale, double softcap,
                                                  double dropout_p, bool save_stats) {
  AttentionArguments arguments =
      attention_arguments(kVarlen, q, k, v, bias, mask, alibi_slopes, sinks, kNoTensor, rng_state, causal, window_left,
                          window_right, scale, softcap, dropout_p);
  const PackedArguments packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  arguments.packed = &packed;
  return fastattn::attention_forward(arguments, save_stats);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> varlen_backward(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& stats, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t causal, int64_t window_left,
    int64_t window_right, std::optional<double> scale, double softcap, double dropout_p, bool need_d_bias,
    bool need_d_sinks) {
  AttentionArguments arguments =
      attention_arguments(kVarlen, q, k, v, bias, mask, alibi_slopes, sinks, kNoTensor, rng_state, causal, window_left,
                          window_right, scale, softcap, dropout_p);
  const PackedArguments packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  arguments.packed = &packed;
  const fastattn::AttentionGradients grads =
      fastattn::attention_backward({arguments, d_o, d_lse, o, stats, need_d_bias, need_d_sinks});
  return {grads.dq, grads.dk, grads.dv, grads.d_bias, grads.d_sinks};
}

void check_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                  const Tensor& cu_seqlens_k, const OptionalTensor& bias, const OptionalTensor& mask,
                  const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& rng_state,
                  int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t causal, int64_t window_left, int64_t window_right,
                  std::optional<double> scale, double softcap, double dropout_p, std::string device) {
  AttentionArguments arguments =
      attention_arguments(kVarlen, q, k, v, bias, mask, alibi_slopes, sinks, kNoTensor, rng_state, causal, window_left,
                          window_right, scale, softcap, dropout_p);
  const PackedArguments packed{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  arguments.packed = &packed;
  fastattn::check_attention(arguments, device == "cuda");
}

AttentionArguments additive_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
                                      const OptionalTensor& mask, const OptionalTensor& kv_lengths,
                                      const OptionalTensor& rng_state, int64_t causal, double dropout_p) {
  return {.texts = kAdditive,
          .q = q,
          .k = k,
          .v = v,
          .mask = mask,
          .kv_lengths = kv_lengths,
          .rng_state = rng_state,
          .w = &w,
          .causal = causal,
          .scale = 1.0,
          .dropout_p = dropout_p};
}

std::tuple<Tensor, Tensor, Tensor> additive_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
                                                    const OptionalTensor& mask, const OptionalTensor& kv_lengths,
                                                    const OptionalTensor& rng_state, int64_t causal, double dropout_p,
                                                    bool save_stats) {
  return fastattn::attention_forward(additive_arguments(q, k, v, w, mask, kv_lengths, rng_state, causal, dropout_p),
                                     save_stats);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_backward(
    const Tensor& d_o, const OptionalTensor& d_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
    const Tensor& o, const Tensor& stats, const OptionalTensor& mask, const OptionalTensor& kv_lengths,
    const OptionalTensor& rng_state, int64_t causal, double dropout_p) {
  const AttentionArguments arguments = additive_arguments(q, k, v, w, mask, kv_lengths, rng_state, causal, dropout_p);
  const fastattn::AttentionGradients grads =
      fastattn::attention_backward({arguments, d_o, d_lse, o, stats, false, false});
  return {grads.dq, grads.dk, grads.dv, grads.dw};
}

void check_additive(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w, const OptionalTensor& mask,
                    const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal, double dropout_p,
                    std::string device) {
  fastattn::check_attention(additive_arguments(q, k, v, w, mask, kv_lengths, rng_state, causal, dropout_p),
                            device == "cuda");
}

AttentionArguments hard_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                  const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal,
                                  int64_t window_left, int64_t window_right, std::optional<double> scale) {
  return {.texts = kHard,
          .q = q,
          .k = k,
          .v = v,
          .mask = mask,
          .kv_lengths = kv_lengths,
          .rng_state = rng_state,
          .causal = causal,
          .window_left = window_left,
          .window_right = window_right,
          .scale = scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hard_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                        const OptionalTensor& mask, const OptionalTensor& kv_lengths,
                                                        const OptionalTensor& rng_state, int64_t causal,
                                                        int64_t window_left, int64_t window_right,
                                                        std::optional<double> scale, bool save_stats) {
  return fastattn::hard_attention_forward(
      hard_arguments(q, k, v, mask, kv_lengths, rng_state, causal, window_left, window_right, scale), save_stats);
}

std::tuple<Tensor, Tensor, Tensor> hard_backward(const OptionalTensor& d_o, const OptionalTensor& d_log_prob,
                                                 const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index,
                                                 const Tensor& stats, const OptionalTensor& mask,
                                                 const OptionalTensor& kv_lengths, int64_t causal, int64_t window_left,
                                                 int64_t window_right, std::optional<double> scale) {
  return fastattn::hard_attention_backward(
      {hard_arguments(q, k, v, mask, kv_lengths, kNoTensor, causal, window_left, window_right, scale), d_o, d_log_prob,
       index, stats});
}

void check_hard(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                const OptionalTensor& kv_lengths, const OptionalTensor& rng_state, int64_t causal, int64_t window_left,
                int64_t window_right, std::optional<double> scale, std::string device) {
  fastattn::check_attention(
      hard_arguments(q, k, v, mask, kv_lengths, rng_state, causal, window_left, window_right, scale), device == "cuda");
}

AttentionArguments summary_arguments(const Tensor& q, const Tensor& k, const OptionalTensor& bias,
                                     const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, const OptionalTensor& kv_lengths, int64_t causal,
                                     int64_t window_left, int64_t window_right, std::optional<double> scale,
                                     double softcap) {
  return {.texts = kSummary,
          .q = q,
          .k = k,
          .v = k,
          .bias = bias,
          .mask = mask,
          .alibi_slopes = alibi_slopes,
          .sinks = sinks,
          .kv_lengths = kv_lengths,
          .causal = causal,
          .window_left = window_left,
          .window_right = window_right,
          .scale = scale,
          .softcap = softcap};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> summary(
    const Tensor& q, const Tensor& k, const OptionalTensor& bias, const OptionalTensor& mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& kv_lengths,
    const OptionalTensor& row_mask, int64_t causal, int64_t window_left, int64_t window_right,
    std::optional<double> scale, double softcap, int64_t top_k, bool need_mass) {
  return fastattn::attention_summary({summary_arguments(q, k, bias, mask, alibi_slopes, sinks, kv_lengths, causal,
                                                        window_left, window_right, scale, softcap),
                                      row_mask, top_k, need_mass});
}

void check_summary(const Tensor& q, const Tensor& k, const OptionalTensor& bias, const OptionalTensor& mask,
                   const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& kv_lengths,
                   const OptionalTensor& row_mask, int64_t causal, int64_t window_left, int64_t window_right,
                   std::optional<double> scale, double softcap, int64_t top_k, bool need_mass, std::string device) {
  fastattn::check_summary({summary_arguments(q, k, bias, mask, alibi_slopes, sinks, kv_lengths, causal, window_left,
                                             window_right, scale, softcap),
                           row_mask, top_k, need_mass},
                          device == "cuda");
}

std::tuple<Tensor, Tensor> with_kv_cache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                         const OptionalTensor& k, const OptionalTensor& v, const Tensor& cache_lengths,
                                         const OptionalTensor& block_table, const OptionalTensor& k_scale,
                                         const OptionalTensor& v_scale, const OptionalTensor& rotary_cos,
                                         const OptionalTensor& rotary_sin, const OptionalTensor& alibi_slopes,
                                         const OptionalTensor& sinks, bool rotary_interleaved, int64_t causal,
                                         int64_t window_left, int64_t window_right, std::optional<double> scale,
                                         double softcap) {
  const AttentionArguments attention =
      attention_arguments(kKvCache, q, k_cache, v_cache, kNoTensor, kNoTensor, alibi_slopes, sinks, kNoTensor,
                          kNoTensor, causal, window_left, window_right, scale, softcap, 0.0);
  return fastattn::attention_with_kv_cache(
      {attention, k, v, cache_lengths, block_table, k_scale, v_scale, rotary_cos, rotary_sin, rotary_interleaved});
}

void check_with_kv_cache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
                         const OptionalTensor& v, const Tensor& cache_lengths, const OptionalTensor& block_table,
                         const OptionalTensor& k_scale, const OptionalTensor& v_scale, const OptionalTensor& rotary_cos,
                         const OptionalTensor& rotary_sin, const OptionalTensor& alibi_slopes,
                         const OptionalTensor& sinks, bool rotary_interleaved, int64_t causal, int64_t window_left,
                         int64_t window_right, std::optional<double> scale, double softcap, std::string device) {
  const AttentionArguments attention =
      attention_arguments(kKvCache, q, k_cache, v_cache, kNoTensor, kNoTensor, alibi_slopes, sinks, kNoTensor,
                          kNoTensor, causal, window_left, window_right, scale, softcap, 0.0);
  fastattn::check_kv_cache(
      {attention, k, v, cache_lengths, block_table, k_scale, v_scale, rotary_cos, rotary_sin, rotary_interleaved},
      device == "cuda");
}

}  // namespace

namespace fastattn {

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_forward", TORCH_BOX(&::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&::attention_backward));
  m.impl("_check_attention", TORCH_BOX(&::check_attention));
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_forward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_backward));
  m.impl("_check_varlen_attention", TORCH_BOX(&check_varlen));
  m.impl("additive_attention_forward", TORCH_BOX(&additive_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_backward));
  m.impl("_check_additive_attention", TORCH_BOX(&check_additive));
  m.impl("hard_attention_forward", TORCH_BOX(&hard_forward));
  m.impl("hard_attention_backward", TORCH_BOX(&hard_backward));
  m.impl("_check_hard_attention", TORCH_BOX(&check_hard));
  m.impl("attention_summary", TORCH_BOX(&summary));
  m.impl("_check_attention_summary", TORCH_BOX(&::check_summary));
  m.impl("attention_with_kv_cache", TORCH_BOX(&with_kv_cache));
  m.impl("_check_attention_with_kv_cache", TORCH_BOX(&check_with_kv_cache));
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace fastattn
