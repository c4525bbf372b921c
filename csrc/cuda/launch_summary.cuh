// The kernels of the summary for one dtype: the files that compile kernels instantiate this, and everything else sees
// the declaration.
#pragma once

#include "cuda/summary.cuh"

namespace fastattn::cuda {

template <DType kType, int kDim, class Launcher>
void launch_summary_dim(Launcher& launcher, const WalkPlan& plan, const SummaryKernelParams& p) {
  const AttentionParams& a = p.walk.attention;
  launcher.template launch<SummaryRowsKernel<kType, kDim>>(plan.row_blocks * a.Hq * a.B, p);
  if (p.key_mass) launcher.template launch<SummaryMassKernel<kType, kDim>>(plan.key_blocks * a.Hq * a.B, p);
}

template <DType kType, class Launcher>
void launch_summary(Launcher& launcher, const WalkPlan& plan, const SummaryKernelParams& p) {
  switch (plan.dim) {
    case 64:
      return launch_summary_dim<kType, 64>(launcher, plan, p);
    case 128:
      return launch_summary_dim<kType, 128>(launcher, plan, p);
    default:
      return launch_summary_dim<kType, 256>(launcher, plan, p);
  }
}

}  // namespace fastattn::cuda
