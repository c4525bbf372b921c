// Operators beside attention: dropout's mask, instruction set levels, measurements, the build.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace fastattn {

// The bool mask (True = kept) that attention draws from rng_state, [B, H, Lq, Lk].
torch::stable::Tensor dropout_mask(const torch::stable::Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk,
                                   double p);

void set_isa(std::string name);
std::string isa();
std::string supported_isas();  // comma separated, lowest first

// Multiply-add peak at the active level in flop per second, for dtype "float32" or "bfloat16".
double measure_peak(std::string dtype, int64_t threads);

// Lines "key: value" on how this library was compiled.
std::string build_info();

}  // namespace fastattn
