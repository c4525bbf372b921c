// Packed sequences, each as a problem of its own: kernels see dense ones alone.
#pragma once

#include <vector>

#include "core/params.h"

namespace fastattn::cpu {

// The sequences of a packed call, those with the most work first: they are then not what the last thread waits for.
// Each has B = 1, pointers moved to its rows, keys, bias, mask and slopes, and shares the results' memory.
std::vector<AttentionParams> packed_problems(const AttentionParams& params);
std::vector<AttentionGradParams> packed_problems(const AttentionGradParams& params);

// Rows (and, in the backward pass, keys) of no sequence: what they leave in the results. cu_seqlens begin with 0 and
// never decrease, so that these are the last ones.
void clear_rows_of_no_sequence(const AttentionParams& params);
void clear_rows_of_no_sequence(const AttentionGradParams& params);

}  // namespace fastattn::cpu
