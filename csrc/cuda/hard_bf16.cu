// The kernels of hard attention for bfloat16.
#include "cuda/launch_hard.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_hard_forward<DType::kBFloat16, CudaLauncher>(CudaLauncher&, const WalkPlan&,
                                                                  const HardForwardParams&);
template void launch_hard_backward<DType::kBFloat16, CudaLauncher>(CudaLauncher&, const WalkPlan&,
                                                                   const HardBackwardParams&);

}  // namespace fastattn::cuda
