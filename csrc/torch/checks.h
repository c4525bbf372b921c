// The rules that the operators share; each throws std::invalid_argument. checks.cpp has them, and those of all
// operators but attention_with_kv_cache, which are in checks_kv_cache.cpp.
#pragma once

#include <initializer_list>

#include "core/params.h"
#include "torch/arguments.h"

namespace fastattn {

void check_rank(const char* name, const Tensor& tensor, int64_t rank, const OperatorTexts& texts);
void check_device(const char* name, const Tensor& tensor, const Tensor& q);  // q's
DType check_query_dtype(const Tensor& q);
void check_same_dtype(const char* name, const Tensor& tensor, DType dtype);         // q's dtype
void check_accumulator_dtype(const char* name, const Tensor& tensor, DType dtype);  // of q's dtype
void check_limits_of_cuda(const AttentionParams& p, const OperatorTexts& texts);
void check_alibi_slopes(const Tensor& slopes, const AttentionParams& p);
void check_sinks(const Tensor& sinks, const AttentionParams& p);
// Fills in causal, window, scale, softcap and dropout_p.
void check_numbers(const AttentionArguments& a, AttentionParams* p);

// Whether a tensor of these sizes has a byte count that an int64 holds, gradients in the accumulator type included.
bool fits(std::initializer_list<int64_t> sizes);

}  // namespace fastattn
