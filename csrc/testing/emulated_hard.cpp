// The kernels of hard attention, compiled for the emulator.
#include "cuda/hard_engine.cuh"
#include "testing/emulated_launcher.h"

namespace fastattn::cuda {

using emulator::EmulatedLauncher;

template void launch_hard_forward<DType::kFloat32>(EmulatedLauncher&, const WalkPlan&, const HardForwardParams&);
template void launch_hard_backward<DType::kFloat32>(EmulatedLauncher&, const WalkPlan&, const HardBackwardParams&);
template void launch_hard_forward<DType::kBFloat16>(EmulatedLauncher&, const WalkPlan&, const HardForwardParams&);
template void launch_hard_backward<DType::kBFloat16>(EmulatedLauncher&, const WalkPlan&, const HardBackwardParams&);
template void launch_hard_forward<DType::kFloat16>(EmulatedLauncher&, const WalkPlan&, const HardForwardParams&);
template void launch_hard_backward<DType::kFloat16>(EmulatedLauncher&, const WalkPlan&, const HardBackwardParams&);

}  // namespace fastattn::cuda
