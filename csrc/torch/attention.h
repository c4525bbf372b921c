// The attention operators on tensors of the engine's device.
#pragma once

#include <tuple>

#include "torch/arguments.h"

namespace fastattn {

// o, lse and stats (row_max, row_sum), the last of shape (0,) unless save_stats.
std::tuple<Tensor, Tensor, Tensor> attention_forward(const AttentionArguments& arguments, bool save_stats);

// d_bias and d_sinks are of shape (0,) unless asked for, dw is without w.
struct AttentionGradients {
  Tensor dq, dk, dv, d_bias, d_sinks, dw;
};
AttentionGradients attention_backward(const AttentionGradArguments& arguments);

// o, index, log_prob and stats; argmax where there is no rng_state.
std::tuple<Tensor, Tensor, Tensor, Tensor> hard_attention_forward(const AttentionArguments& arguments, bool save_stats);

// dq, dk and dv.
std::tuple<Tensor, Tensor, Tensor> hard_attention_backward(const HardAttentionGradArguments& arguments);

// entropy, max_weight, top_weights, top_index, key_mass (of shape (0,) unless asked for) and lse.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_summary(const SummaryArguments& arguments);

// o and lse; k and v are in the cache afterwards.
std::tuple<Tensor, Tensor> attention_with_kv_cache(const KvCacheArguments& arguments);

// The bool mask (True = kept) that attention draws from rng_state, [B, H, Lq, Lk].
Tensor dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p);

}  // namespace fastattn
