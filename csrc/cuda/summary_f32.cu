// The kernels of the summary for float32.
#include "cuda/launch_summary.cuh"
#include "cuda/launcher.cuh"

namespace fastattn::cuda {

template void launch_summary<DType::kFloat32, CudaLauncher>(CudaLauncher&, const WalkPlan&, const SummaryKernelParams&);

}  // namespace fastattn::cuda
