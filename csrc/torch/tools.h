// Operators of the CPU library that compute no attention: instruction set levels, measurements, the build.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace fastattn {

using torch::stable::Tensor;

void set_isa(std::string name);
std::string isa();
std::string all_isas();        // of this architecture, comma separated, lowest first
std::string supported_isas();  // those that this processor has

// Multiply-add peak at the active level in flop per second, for dtype "float32" or "bfloat16".
double measure_peak(std::string dtype, int64_t threads);

// Reads both tensors' elements as 8-byte words, by torch's threads, and adds them up: their sum, modulo 2^64. The time
// that this takes is the benchmark's measure of the memory's bandwidth.
int64_t sum_words(const Tensor& x, const Tensor& y);

// Lines "key: value" on how this library was compiled.
std::string build_info();

}  // namespace fastattn
