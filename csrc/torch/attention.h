// The attention operators on tensors of the engine's device.
#pragma once

#include <tuple>

#include "torch/arguments.h"

namespace fastattn {

// o, lse and stats (row_max, row_sum), the last of shape (0,) unless save_stats.
std::tuple<Tensor, Tensor, Tensor> attention_forward(const AttentionArguments& arguments, bool save_stats);

// dq, dk, dv, d_bias and d_sinks; the last two of shape (0,) unless asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionGradArguments& arguments);

// The bool mask (True = kept) that attention draws from rng_state, [B, H, Lq, Lk].
Tensor dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p);

}  // namespace fastattn
