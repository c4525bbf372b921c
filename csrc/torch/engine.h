// What the binding asks of the kernels. Two libraries share everything else in this folder, and each links one file
// that answers for it: cpu_engine.cpp in _C_cpu, cuda_engine.cpp in _C_cuda.
#pragma once

#include "core/cache.h"
#include "core/params.h"
#include "torch/tensors.h"

namespace fastattn::engine {

struct MaskSizes {
  int64_t B, H, Lq, Lk;
};

// Throws std::invalid_argument when there is no kernel for this very device. The rules for its kind are in checks.cpp.
void check_device(const Device& device);

// state: (seed, offset), contiguous, on the engine's device; outlives the launch.
void set_rng_state(const int64_t* state, AttentionParams* params);

// Arguments have been checked, results allocated, and there is something to compute.
void attention_forward(const AttentionParams& params, const Device& device);
void attention_backward(const AttentionGradParams& params, const Device& device);
void hard_attention_forward(const HardAttentionParams& params, const Device& device);
void hard_attention_backward(const HardAttentionGradParams& params, const Device& device);
void attention_summary(const SummaryParams& params, const Device& device);
// Writes new_lengths always; k and v into the cache, and rotated_q, where there are any. Before attention_forward, on
// the same stream.
void append_to_cache(const CacheAppendParams& params, const Device& device);
void dropout_mask(uint8_t* keep, const int64_t* state, const MaskSizes& sizes, double p, const Device& device);

}  // namespace fastattn::engine
