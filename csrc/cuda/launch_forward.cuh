// From a plan to the forward kernel that serves it, for one dtype: the files that compile kernels instantiate this, and
// everything else sees the declaration.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/heuristics.h"

namespace fastattn::cuda {

template <DType kType, int kDim, ForwardVariant kVariant>
struct ForwardKernelFor {
  static constexpr ForwardTiles kTiles = forward_tiles(kType, kDim, kVariant);
  using Kernel =
      ForwardKernel<kType, kDim, kTiles.block_m, kTiles.block_n, kTiles.warps, kVariant != ForwardVariant::kPlain>;
  static_assert(Kernel::kSharedBytes == forward_shared_bytes(kType, kDim, kTiles));
};

template <DType kType, class Launcher, int kDim>
void launch_forward_dim(Launcher& launcher, const ForwardPlan& plan, const ForwardParams& p) {
  if constexpr (kType != DType::kFloat32) {
    if (plan.variant == ForwardVariant::kPlain) {
      return launcher.template launch<typename ForwardKernelFor<kType, kDim, ForwardVariant::kPlain>::Kernel>(
          plan.blocks, p);
    }
    if (plan.variant == ForwardVariant::kFewRows) {
      return launcher.template launch<typename ForwardKernelFor<kType, kDim, ForwardVariant::kFewRows>::Kernel>(
          plan.blocks, p);
    }
  }
  launcher.template launch<typename ForwardKernelFor<kType, kDim, ForwardVariant::kModified>::Kernel>(plan.blocks, p);
}

template <DType kType, class Launcher>
void launch_forward(Launcher& launcher, const ForwardPlan& plan, const ForwardParams& p) {
  switch (plan.dim) {
    case 32:
      return launch_forward_dim<kType, Launcher, 32>(launcher, plan, p);
    case 64:
      return launch_forward_dim<kType, Launcher, 64>(launcher, plan, p);
    case 96:
      return launch_forward_dim<kType, Launcher, 96>(launcher, plan, p);
    case 128:
      return launch_forward_dim<kType, Launcher, 128>(launcher, plan, p);
    case 192:
      return launch_forward_dim<kType, Launcher, 192>(launcher, plan, p);
    default:
      return launch_forward_dim<kType, Launcher, 256>(launcher, plan, p);
  }
}

}  // namespace fastattn::cuda
