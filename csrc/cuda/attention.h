// The CUDA engine's interface for the binding (csrc/torch). No CUDA header is needed to include it.
//
// Served: float16, bfloat16 and float32, head dims up to kMaxHeadDim, lengths up to kMaxLength, compute capability 8.0
// and up; the caller refuses the rest. Every pointer in the params is a device pointer of one device, the current one,
// and is read when the kernels run: a function here only launches them on `stream`, never synchronises and allocates
// nothing. All of them throw std::runtime_error: a launch that fails is reported with the kernel's name, its grid, its
// shared memory, its parameters and CUDA's own message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/cache.h"
#include "core/params.h"

namespace fastattn::cuda {

using Stream = void*;  // cudaStream_t

struct DeviceProperties {
  int compute_capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  int shared_bytes = 0;  // what a block may have at most, by opting in
};

constexpr int64_t kMaxHeadDim = 256;       // of D and Dv
constexpr int64_t kMaxLength = 1LL << 30;  // of Lq and Lk: rows and keys are counted in 32 bits
constexpr int kMinComputeCapability = 80;
constexpr size_t kWorkspaceAlignment = 256;

// Asked for once per device.
DeviceProperties device_properties(int device);

// What the functions below need of scratch memory. Functions of sizes, dtypes and of which pointers are null; no
// pointer is followed.
size_t forward_workspace_bytes(const AttentionParams& params, const DeviceProperties& device);
size_t backward_workspace_bytes(const AttentionGradParams& params, const DeviceProperties& device);
size_t hard_forward_workspace_bytes(const HardAttentionParams& params, const DeviceProperties& device);
size_t hard_backward_workspace_bytes(const HardAttentionGradParams& params, const DeviceProperties& device);
size_t summary_workspace_bytes(const SummaryParams& params, const DeviceProperties& device);

// workspace: that many bytes, aligned to kWorkspaceAlignment, of any contents; null where they need none.
void attention_forward(const AttentionParams& params, const DeviceProperties& device, void* workspace, Stream stream);
void attention_backward(const AttentionGradParams& params, const DeviceProperties& device, void* workspace,
                        Stream stream);

void hard_attention_forward(const HardAttentionParams& params, const DeviceProperties& device, void* workspace,
                            Stream stream);
void hard_attention_backward(const HardAttentionGradParams& params, const DeviceProperties& device, void* workspace,
                             Stream stream);
void attention_summary(const SummaryParams& params, const DeviceProperties& device, void* workspace, Stream stream);

// Writes what core/cache.h says, in place. Needs no scratch memory.
void append_to_cache(const CacheAppendParams& params, Stream stream);

// keep: [B, H, Lq, Lk], contiguous, 1 = kept. rng_state: see AttentionParams.
void dropout_mask(uint8_t* keep, const int64_t* rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p,
                  Stream stream);

// Lines "key: value": the toolkit ("cuda: 13.0"), the architectures ("cuda archs: 80 90 100 120 +ptx80").
std::string build_info();

}  // namespace fastattn::cuda
