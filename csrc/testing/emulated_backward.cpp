// The backward kernels, compiled for the emulator.
#include "testing/emulated_launcher.h"

namespace fastattn::cuda {

using emulator::EmulatedLauncher;

template void launch_backward<DType::kFloat32>(EmulatedLauncher&, const BackwardPlan&, const BiasGradientParams&);
template void launch_backward<DType::kBFloat16>(EmulatedLauncher&, const BackwardPlan&, const BiasGradientParams&);
template void launch_backward<DType::kFloat16>(EmulatedLauncher&, const BackwardPlan&, const BiasGradientParams&);

}  // namespace fastattn::cuda
