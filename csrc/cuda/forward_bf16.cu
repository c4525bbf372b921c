// The forward kernels for bfloat16.
#include "cuda/launch_forward.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_forward<DType::kBFloat16, CudaLauncher>(CudaLauncher&, const ForwardPlan&, const ForwardParams&);

}  // namespace fastattn::cuda
