// The backward kernels of one dtype, in order: row statistics, then dk and dv, dq, and what bias and sinks want.
#pragma once

#include "cuda/backward_bias.cuh"
#include "cuda/backward_keys.cuh"
#include "cuda/backward_queries.cuh"
#include "cuda/backward_rows.cuh"
#include "cuda/heuristics.h"

namespace fastattn::cuda {

template <DType kType, class Launcher, int kDim, bool kModified>
void launch_gradients(Launcher& launcher, const BackwardPlan& plan, const BackwardParams& p) {
  if constexpr (splits_dk_dv(kType, kDim)) {
    launcher.template launch<BackwardKeysKernel<kType, kDim, kModified, true, false>>(plan.key_ctas, p);
    launcher.template launch<BackwardKeysKernel<kType, kDim, kModified, false, true>>(plan.key_ctas, p);
  } else {
    launcher.template launch<BackwardKeysKernel<kType, kDim, kModified, true, true>>(plan.key_ctas, p);
  }
  launcher.template launch<BackwardQueriesKernel<kType, kDim, kModified>>(plan.query_ctas, p);
}

template <DType kType, class Launcher, int kDim>
void launch_backward_dim(Launcher& launcher, const BackwardPlan& plan, const BiasGradientParams& p) {
  const BackwardParams& backward = p.backward;
  if constexpr (kType != DType::kFloat32) {
    if (plan.is_plain) launch_gradients<kType, Launcher, kDim, false>(launcher, plan, backward);
  }
  if (!plan.is_plain) launch_gradients<kType, Launcher, kDim, true>(launcher, plan, backward);
  if (backward.grad.d_bias) {
    launcher.template launch<BackwardBiasKernel<kType, kDim>>(plan.bias_ctas, p);
    if (p.chunks > 1) {
      launcher.template launch<SumChunksKernel>(divide_up(p.elements, SumChunksKernel::kThreads), p);
    }
  }
}

template <DType kType, class Launcher>
void launch_backward(Launcher& launcher, const BackwardPlan& plan, const BiasGradientParams& p) {
  BackwardParams rows = p.backward;
  AttentionParams& a = rows.grad.forward;
  a = as_one_sequence(a);
  launcher.template launch<RowStatisticsKernel<kType>>(
      divide_up(a.B * a.Hq * a.Lq, RowStatisticsKernel<kType>::kRowsPerBlock), rows);
  if (rows.grad.d_sinks) launcher.template launch<SinkGradientKernel>(a.Hq, rows);
  switch (plan.dim) {
    case 32:
      return launch_backward_dim<kType, Launcher, 32>(launcher, plan, p);
    case 64:
      return launch_backward_dim<kType, Launcher, 64>(launcher, plan, p);
    case 96:
      return launch_backward_dim<kType, Launcher, 96>(launcher, plan, p);
    case 128:
      return launch_backward_dim<kType, Launcher, 128>(launcher, plan, p);
    case 192:
      return launch_backward_dim<kType, Launcher, 192>(launcher, plan, p);
    default:
      return launch_backward_dim<kType, Launcher, 256>(launcher, plan, p);
  }
}

}  // namespace fastattn::cuda
