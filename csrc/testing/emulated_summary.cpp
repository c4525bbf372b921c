// The kernels of the summary, compiled for the emulator.
#include "cuda/summary_engine.cuh"
#include "testing/emulated_launcher.h"

namespace fastattn::cuda {

using emulator::EmulatedLauncher;

template void launch_summary<DType::kFloat32>(EmulatedLauncher&, const WalkPlan&, const SummaryKernelParams&);
template void launch_summary<DType::kBFloat16>(EmulatedLauncher&, const WalkPlan&, const SummaryKernelParams&);
template void launch_summary<DType::kFloat16>(EmulatedLauncher&, const WalkPlan&, const SummaryKernelParams&);

}  // namespace fastattn::cuda
