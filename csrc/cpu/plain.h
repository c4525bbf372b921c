// The float64 path: plain, readable algorithms with every feature, for gradcheck and as the C++ tests' oracle.
#pragma once

#include <vector>

#include "core/cache.h"
#include "core/params.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

// dtype must be kFloat64; what is read and written is that of their namesakes in attention.h. The result does not
// depend on the number of threads. All throw std::bad_alloc when there is no memory for a few rows of scores.
void plain_forward_f64(const AttentionParams& params, const Parallel& parallel);
// `problems` are what params is cut into: itself, or its packed sequences.
void plain_backward_f64(const AttentionGradParams& params, const std::vector<AttentionGradParams>& problems,
                        const Parallel& parallel);
void plain_hard_forward_f64(const HardAttentionParams& params, const Parallel& parallel);
void plain_hard_backward_f64(const HardAttentionGradParams& params, const Parallel& parallel);
void plain_summary_f64(const SummaryParams& params, const Parallel& parallel);
void plain_append_f64(const CacheAppendParams& params);

}  // namespace fastattn::cpu
