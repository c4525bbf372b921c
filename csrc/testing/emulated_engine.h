// The CUDA engine on the emulator: the kernels that nvcc compiles, compiled for the host and run one thread after
// another.
#pragma once

#include <string>
#include <vector>

#include "cuda/attention.h"
#include "testing/emulator/emulator.h"

namespace fastattn::emulator {

// What a call ran: every kernel's name in order, and what the emulator counted in all of them.
struct Run {
  std::vector<std::string> kernels;
  Report report;
};

// Of AttentionParams whose pointers are host pointers. Scratch memory starts out as NaN. Throws std::runtime_error for
// what the emulator finds wrong.
Run attention_forward(const AttentionParams& params, const cuda::DeviceProperties& device, const Options& options,
                      int os_threads);
Run attention_backward(const AttentionGradParams& params, const cuda::DeviceProperties& device, const Options& options,
                       int os_threads);
Run append_to_cache(const CacheAppendParams& params, const Options& options, int os_threads);
Run dropout_mask(uint8_t* keep, const int64_t* rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p,
                 const Options& options, int os_threads);
Run hard_attention_forward(const HardAttentionParams& params, const cuda::DeviceProperties& device,
                           const Options& options, int os_threads);
Run hard_attention_backward(const HardAttentionGradParams& params, const cuda::DeviceProperties& device,
                            const Options& options, int os_threads);
Run attention_summary(const SummaryParams& params, const cuda::DeviceProperties& device, const Options& options,
                      int os_threads);

// The plain bfloat16 kernel for heads of 64 with tiles that are not swizzled: what conflicts of banks would cost.
Run attention_forward_unswizzled(const AttentionParams& params, const Options& options, int os_threads);

}  // namespace fastattn::emulator
