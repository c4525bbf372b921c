// The kernels for additive scores, for all dtypes.
#include "cuda/launch_additive.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_additive_forward(CudaLauncher&, const ForwardPlan&, const ForwardParams&);
template void launch_additive_backward(CudaLauncher&, const BackwardPlan&, const AdditiveBackwardParams&);

}  // namespace fastattn::cuda
