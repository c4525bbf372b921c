// The backward kernels for float32.
#include "cuda/launch_backward.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_backward<DType::kFloat32, CudaLauncher>(CudaLauncher&, const BackwardPlan&,
                                                             const BiasGradientParams&);

}  // namespace fastattn::cuda
