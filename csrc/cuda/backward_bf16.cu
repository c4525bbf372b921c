// The backward kernels for bfloat16.
#include "cuda/launch_backward.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_backward<DType::kBFloat16, CudaLauncher>(CudaLauncher&, const BackwardPlan&,
                                                              const BiasGradientParams&);

}  // namespace fastattn::cuda
