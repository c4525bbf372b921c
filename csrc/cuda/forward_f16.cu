// The forward kernels for float16.
#include "cuda/launch_forward.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_forward<DType::kFloat16, CudaLauncher>(CudaLauncher&, const ForwardPlan&, const ForwardParams&);

}  // namespace fastattn::cuda
