// The engine's interface (attention.h) on a GPU. The kernels of each dtype are compiled in files of their own.
#include "cuda/attention.h"

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>

#include "cuda/engine.cuh"
#include "cuda/hard_engine.cuh"
#include "cuda/launcher.cuh"
#include "cuda/summary_engine.cuh"

#ifndef FASTATTN_CUDA_ARCHS
#define FASTATTN_CUDA_ARCHS "unknown"
#endif

namespace fastattn::cuda {

using enum DType;

extern template void launch_forward<kFloat32>(CudaLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_forward<kBFloat16>(CudaLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_forward<kFloat16>(CudaLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_backward<kFloat32>(CudaLauncher&, const BackwardPlan&, const BiasGradientParams&);
extern template void launch_backward<kBFloat16>(CudaLauncher&, const BackwardPlan&, const BiasGradientParams&);
extern template void launch_backward<kFloat16>(CudaLauncher&, const BackwardPlan&, const BiasGradientParams&);
extern template void launch_additive_forward(CudaLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_additive_backward(CudaLauncher&, const BackwardPlan&, const AdditiveBackwardParams&);
extern template void launch_hard_forward<kFloat32>(CudaLauncher&, const WalkPlan&, const HardForwardParams&);
extern template void launch_hard_forward<kBFloat16>(CudaLauncher&, const WalkPlan&, const HardForwardParams&);
extern template void launch_hard_forward<kFloat16>(CudaLauncher&, const WalkPlan&, const HardForwardParams&);
extern template void launch_hard_backward<kFloat32>(CudaLauncher&, const WalkPlan&, const HardBackwardParams&);
extern template void launch_hard_backward<kBFloat16>(CudaLauncher&, const WalkPlan&, const HardBackwardParams&);
extern template void launch_hard_backward<kFloat16>(CudaLauncher&, const WalkPlan&, const HardBackwardParams&);
extern template void launch_summary<kFloat32>(CudaLauncher&, const WalkPlan&, const SummaryKernelParams&);
extern template void launch_summary<kBFloat16>(CudaLauncher&, const WalkPlan&, const SummaryKernelParams&);
extern template void launch_summary<kFloat16>(CudaLauncher&, const WalkPlan&, const SummaryKernelParams&);

namespace {

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) {
    const char* remedy = error == cudaErrorInsufficientDriver
                             ? ": update the NVIDIA driver, or build fastattn with the nvcc of the driver's CUDA"
                             : "";
    throw std::runtime_error("the properties of CUDA device " + std::to_string(device) +
                             " could not be read: " + cudaGetErrorString(error) + remedy);
  }
  return value;
}

CudaLauncher launcher_on(Stream stream) { return CudaLauncher(static_cast<cudaStream_t>(stream)); }

}  // namespace

DeviceProperties device_properties(int device) {
  // Two threads that ask at once both read the same numbers.
  constexpr int kCached = 64;
  static DeviceProperties cache[kCached];
  static std::atomic<bool> is_cached[kCached];
  const bool has_slot = device >= 0 && device < kCached;
  if (has_slot && is_cached[device].load(std::memory_order_acquire)) return cache[device];
  DeviceProperties properties;
  properties.compute_capability = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                  device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  properties.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  properties.shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (has_slot) {
    cache[device] = properties;
    is_cached[device].store(true, std::memory_order_release);
  }
  return properties;
}

size_t forward_workspace_bytes(const AttentionParams& params, const DeviceProperties& device) {
  return forward_workspace(params, device);
}
size_t backward_workspace_bytes(const AttentionGradParams& params, const DeviceProperties& device) {
  return backward_workspace(params, device);
}

void attention_forward(const AttentionParams& params, const DeviceProperties& device, void* workspace, Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_forward(launcher, params, device, workspace);
}

void attention_backward(const AttentionGradParams& params, const DeviceProperties& device, void* workspace,
                        Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_backward(launcher, params, device, workspace);
}

void append_to_cache(const CacheAppendParams& params, Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_append(launcher, params);
}

void dropout_mask(uint8_t* keep, const int64_t* rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p,
                  Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_dropout_mask(launcher, keep, rng_state, B, H, Lq, Lk, p);
}

std::string build_info() {
  const std::string toolkit = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return "cuda: " + toolkit + "\ncuda archs: " FASTATTN_CUDA_ARCHS;
}

size_t hard_forward_workspace_bytes(const HardAttentionParams& params, const DeviceProperties& device) {
  return hard_forward_workspace(params, device);
}
size_t hard_backward_workspace_bytes(const HardAttentionGradParams& params, const DeviceProperties& device) {
  return hard_backward_workspace(params, device);
}
size_t summary_workspace_bytes(const SummaryParams& params, const DeviceProperties& device) {
  return summary_workspace(params, device);
}

void hard_attention_forward(const HardAttentionParams& params, const DeviceProperties& device, void* workspace,
                            Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_hard_forward(launcher, params, device, workspace);
}

void hard_attention_backward(const HardAttentionGradParams& params, const DeviceProperties& device, void* workspace,
                             Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_hard_backward(launcher, params, device, workspace);
}

void attention_summary(const SummaryParams& params, const DeviceProperties& device, void* workspace, Stream stream) {
  CudaLauncher launcher = launcher_on(stream);
  run_summary(launcher, params, device, workspace);
}

}  // namespace fastattn::cuda
