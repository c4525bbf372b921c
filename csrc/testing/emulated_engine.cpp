#include "testing/emulated_engine.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "cuda/summary_engine.cuh"
#include "testing/emulated_launcher.h"

namespace fastattn::cuda {

using emulator::EmulatedLauncher;

using enum DType;

extern template void launch_forward<kFloat32>(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_forward<kBFloat16>(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_forward<kFloat16>(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_backward<kFloat32>(EmulatedLauncher&, const BackwardPlan&, const BiasGradientParams&);
extern template void launch_backward<kBFloat16>(EmulatedLauncher&, const BackwardPlan&, const BiasGradientParams&);
extern template void launch_backward<kFloat16>(EmulatedLauncher&, const BackwardPlan&, const BiasGradientParams&);
extern template void launch_additive_forward(EmulatedLauncher&, const ForwardPlan&, const ForwardParams&);
extern template void launch_additive_backward(EmulatedLauncher&, const BackwardPlan&, const AdditiveBackwardParams&);
extern template void launch_hard_forward<kFloat32>(EmulatedLauncher&, const WalkPlan&, const HardForwardParams&);
extern template void launch_hard_forward<kBFloat16>(EmulatedLauncher&, const WalkPlan&, const HardForwardParams&);
extern template void launch_hard_forward<kFloat16>(EmulatedLauncher&, const WalkPlan&, const HardForwardParams&);
extern template void launch_hard_backward<kFloat32>(EmulatedLauncher&, const WalkPlan&, const HardBackwardParams&);
extern template void launch_hard_backward<kBFloat16>(EmulatedLauncher&, const WalkPlan&, const HardBackwardParams&);
extern template void launch_hard_backward<kFloat16>(EmulatedLauncher&, const WalkPlan&, const HardBackwardParams&);
extern template void launch_summary<kFloat32>(EmulatedLauncher&, const WalkPlan&, const SummaryKernelParams&);
extern template void launch_summary<kBFloat16>(EmulatedLauncher&, const WalkPlan&, const SummaryKernelParams&);
extern template void launch_summary<kFloat16>(EmulatedLauncher&, const WalkPlan&, const SummaryKernelParams&);

}  // namespace fastattn::cuda

namespace fastattn::emulator {
namespace {

// Scratch memory full of NaN, aligned as the engine wants it.
struct Workspace {
  explicit Workspace(size_t bytes)
      : storage(bytes / sizeof(float) + cuda::kWorkspaceAlignment, std::numeric_limits<float>::quiet_NaN()) {}

  void* data() {
    void* start = storage.data();
    size_t space = storage.size() * sizeof(float);
    return std::align(cuda::kWorkspaceAlignment, 1, start, space);
  }

  std::vector<float> storage;
};

}  // namespace

Run attention_forward(const AttentionParams& params, const cuda::DeviceProperties& device, const Options& options,
                      int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  Workspace workspace(cuda::forward_workspace(params, device));
  cuda::run_forward(launcher, params, device, workspace.data());
  return launcher.run;
}

Run attention_backward(const AttentionGradParams& params, const cuda::DeviceProperties& device, const Options& options,
                       int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  Workspace workspace(cuda::backward_workspace(params, device));
  cuda::run_backward(launcher, params, device, workspace.data());
  return launcher.run;
}

Run hard_attention_forward(const HardAttentionParams& params, const cuda::DeviceProperties& device,
                           const Options& options, int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  Workspace workspace(cuda::hard_forward_workspace(params, device));
  cuda::run_hard_forward(launcher, params, device, workspace.data());
  return launcher.run;
}

Run hard_attention_backward(const HardAttentionGradParams& params, const cuda::DeviceProperties& device,
                            const Options& options, int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  Workspace workspace(cuda::hard_backward_workspace(params, device));
  cuda::run_hard_backward(launcher, params, device, workspace.data());
  return launcher.run;
}

Run attention_summary(const SummaryParams& params, const cuda::DeviceProperties& device, const Options& options,
                      int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  Workspace workspace(cuda::summary_workspace(params, device));
  cuda::run_summary(launcher, params, device, workspace.data());
  return launcher.run;
}

Run append_to_cache(const CacheAppendParams& params, const Options& options, int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  cuda::run_append(launcher, params);
  return launcher.run;
}

Run dropout_mask(uint8_t* keep, const int64_t* rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p,
                 const Options& options, int os_threads) {
  EmulatedLauncher launcher{options, os_threads, {}};
  cuda::run_dropout_mask(launcher, keep, rng_state, B, H, Lq, Lk, p);
  return launcher.run;
}

Run attention_forward_unswizzled(const AttentionParams& params, const Options& options, int os_threads) {
  using Kernel = cuda::ForwardKernel<DType::kBFloat16, 64, 64, 64, 4, false, false>;
  EmulatedLauncher launcher{options, os_threads, {}};
  cuda::ForwardPlan plan;
  plan.row_blocks = static_cast<int>(cuda::divide_up(params.Lq, Kernel::kBlockM));
  cuda::Arena arena{nullptr};
  launcher.launch<Kernel>(plan.row_blocks * params.Hq * params.B, cuda::forward_params(params, plan, &arena));
  return launcher.run;
}

}  // namespace fastattn::emulator
