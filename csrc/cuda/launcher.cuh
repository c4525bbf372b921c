// Launches kernels on a stream of the current device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <sstream>
#include <stdexcept>

#include "cuda/append.cuh"
#include "cuda/backward_bias.cuh"
#include "cuda/dropout.cuh"
#include "cuda/forward.cuh"
#include "cuda/hard_backward.cuh"
#include "cuda/hard_forward.cuh"
#include "cuda/kernel.h"
#include "cuda/packed.cuh"
#include "cuda/summary.cuh"

namespace fastattn::cuda {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// What an error message says of a kernel's problem.
inline std::string describe(const AttentionParams& a) {
  std::ostringstream text;
  text << "B=" << a.B << " Hq=" << a.Hq << " Hkv=" << a.Hkv << " Lq=" << a.Lq << " Lk=" << a.Lk << " D=" << a.D
       << " Dv=" << a.Dv << " dtype=" << static_cast<int>(a.dtype);
  return text.str();
}
inline std::string describe(const ForwardParams& p) {
  return describe(p.attention) + " splits=" + std::to_string(p.splits);
}
inline std::string describe(const BackwardParams& p) { return describe(p.grad.forward); }
inline std::string describe(const BiasGradientParams& p) {
  return describe(p.backward) + " chunks=" + std::to_string(p.chunks);
}
inline std::string describe(const UncoveredParams& p) {
  return describe(p.attention) + " packed_rows=" + std::to_string(p.attention.packed_rows) +
         " packed_keys=" + std::to_string(p.attention.packed_keys);
}
inline std::string describe(const CacheAppendParams& p) {
  std::ostringstream text;
  text << "B=" << p.B << " Hq=" << p.Hq << " Hkv=" << p.Hkv << " Lq=" << p.Lq << " Lnew=" << p.Lnew << " D=" << p.D
       << " Dv=" << p.Dv << " dtype=" << static_cast<int>(p.dtype);
  return text.str();
}
inline std::string describe(const DropoutMaskParams& p) {
  return "rows=" + std::to_string(p.rows) + " Lk=" + std::to_string(p.Lk);
}

inline std::string describe(const HardForwardParams& p) {
  return describe(p.walk.attention) + " splits=" + std::to_string(p.walk.splits);
}
inline std::string describe(const HardBackwardParams& p) { return describe(p.walk.attention); }
inline std::string describe(const ZeroRowsParams& p) {
  return "rows=" + std::to_string(p.rows) + " dim=" + std::to_string(p.dim);
}
inline std::string describe(const SummaryKernelParams& p) {
  return describe(p.walk.attention) + " top_k=" + std::to_string(p.top_k);
}

constexpr int64_t kMaxGrid = (1LL << 31) - 1;
constexpr int kSharedBytesByDefault = 48 * 1024;  // a kernel that wants more says so, once for each device

class CudaLauncher {
 public:
  explicit CudaLauncher(cudaStream_t stream) : stream_(stream) {}

  template <class Kernel>
  void launch(int64_t blocks, const typename Kernel::Params& params) {
    if (blocks == 0) return;
    if (blocks > kMaxGrid) {
      fail<Kernel>(blocks, params, "a grid has at most 2^31 - 1 blocks: split the batch");
    }
    // Of the launch itself rather than cudaGetLastError's, which may be another library's.
    cudaError_t error = cudaSuccess;
    if (Kernel::kSharedBytes > kSharedBytesByDefault) error = allow_shared_memory<Kernel>();
    if (error == cudaSuccess) {
      void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
      error =
          cudaLaunchKernel(reinterpret_cast<const void*>(&kernel_entry<Kernel>), dim3(static_cast<unsigned>(blocks)),
                           dim3(Kernel::kThreads), arguments, launch_shared_bytes<Kernel>(params), stream_);
    }
    if (error != cudaSuccess) fail<Kernel>(blocks, params, cudaGetErrorString(error));
  }

 private:
  template <class Kernel>
  static cudaError_t allow_shared_memory() {
    static std::atomic<uint64_t> done{0};  // a bit for each of the first 64 devices
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const uint64_t bit = device < 64 ? 1ULL << device : 0;
    if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(&kernel_entry<Kernel>),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
    if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
    return error;
  }

  template <class Kernel>
  [[noreturn]] static void fail(int64_t blocks, const typename Kernel::Params& params, const std::string& reason) {
    std::ostringstream text;
    text << "the kernel " << Kernel::kName << " could not be launched: " << reason << " (" << blocks << " blocks of "
         << Kernel::kThreads << " threads, " << launch_shared_bytes<Kernel>(params) << " bytes of shared memory; "
         << describe(params) << ")";
    throw std::runtime_error(text.str());
  }

  cudaStream_t stream_;
};

}  // namespace fastattn::cuda
