// The kernels of hard attention for float32.
#include "cuda/launch_hard.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_hard_forward<DType::kFloat32, CudaLauncher>(CudaLauncher&, const WalkPlan&,
                                                                 const HardForwardParams&);
template void launch_hard_backward<DType::kFloat32, CudaLauncher>(CudaLauncher&, const WalkPlan&,
                                                                  const HardBackwardParams&);

}  // namespace fastattn::cuda
