// The float64 path: one plain, readable algorithm with every feature, for gradcheck and as the C++ tests' oracle.
#pragma once

#include "core/params.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

// dtype must be kFloat64; what is read and written is that of attention_forward and attention_backward. The result does
// not depend on the number of threads. Both throw std::bad_alloc when there is no memory for a few rows of scores.
void plain_forward_f64(const AttentionParams& params, const Parallel& parallel);
void plain_backward_f64(const AttentionGradParams& params, const Parallel& parallel);

}  // namespace fastattn::cpu
