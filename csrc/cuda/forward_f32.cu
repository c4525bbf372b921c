// The forward kernels for float32.
#include "cuda/launch_forward.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_forward<DType::kFloat32, CudaLauncher>(CudaLauncher&, const ForwardPlan&, const ForwardParams&);

}  // namespace fastattn::cuda
