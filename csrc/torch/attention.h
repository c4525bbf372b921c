// The attention operators on CPU tensors.
#pragma once

#include <tuple>

#include "torch/arguments.h"

namespace fastattn {

// o, lse and stats (row_max, row_sum), the last of shape (0,) unless save_stats.
std::tuple<Tensor, Tensor, Tensor> attention_forward(const AttentionArguments& arguments, bool save_stats);

// dq, dk, dv, d_bias and d_sinks; the last two of shape (0,) unless asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionGradArguments& arguments);

}  // namespace fastattn
