// The kernels for additive scores, compiled for the emulator.
#include "testing/emulated_launcher.h"

namespace fastattn::cuda {

using emulator::EmulatedLauncher;

template void launch_additive_forward(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
template void launch_additive_backward(EmulatedLauncher&, const BackwardPlan&, const AdditiveBackwardParams&);

}  // namespace fastattn::cuda
