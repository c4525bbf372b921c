// The kernels of the summary for bfloat16.
#include "cuda/launch_summary.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_summary<DType::kBFloat16, CudaLauncher>(CudaLauncher&, const WalkPlan&,
                                                             const SummaryKernelParams&);

}  // namespace fastattn::cuda
