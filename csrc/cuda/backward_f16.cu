// The backward kernels for float16.
#include "cuda/launch_backward.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_backward<DType::kFloat16, CudaLauncher>(CudaLauncher&, const BackwardPlan&,
                                                             const BiasGradientParams&);

}  // namespace fastattn::cuda
