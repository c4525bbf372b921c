// The forward kernels, compiled for the emulator.
#include "testing/emulated_launcher.h"

namespace fastattn::cuda {

using emulator::EmulatedLauncher;

template void launch_forward<DType::kFloat32>(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
template void launch_forward<DType::kBFloat16>(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
template void launch_forward<DType::kFloat16>(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);

}  // namespace fastattn::cuda
