// The kernels for additive scores, in order: the files that compile them instantiate this, and everything else sees the
// declaration.
#pragma once

#include "cuda/additive_backward.cuh"
#include "cuda/additive_forward.cuh"
#include "cuda/backward_rows.cuh"

namespace fastattn::cuda {

template <class Launcher>
void launch_additive_forward(Launcher& launcher, const ForwardPlan& plan, const ForwardParams& p) {
  launcher.template launch<AdditiveForwardKernel>(plan.blocks, p);
}

template <class Launcher>
void launch_additive_backward(Launcher& launcher, const BackwardPlan& plan, const AdditiveBackwardParams& p) {
  const AttentionParams& a = p.grad.forward;
  const auto row_statistics = [&]<DType kType>() {
    using Kernel = RowStatisticsKernel<kType>;
    launcher.template launch<Kernel>(divide_up(a.B * a.Hq * a.Lq, Kernel::kRowsPerBlock), p);
  };
  if (a.dtype == DType::kFloat32) {
    row_statistics.template operator()<DType::kFloat32>();
  } else if (a.dtype == DType::kBFloat16) {
    row_statistics.template operator()<DType::kBFloat16>();
  } else {
    row_statistics.template operator()<DType::kFloat16>();
  }
  launcher.template launch<AdditiveBackwardKeysKernel>(plan.key_ctas, p);
  launcher.template launch<AdditiveBackwardRowsKernel>(plan.query_ctas, p);
  const int64_t heads = a.w_stride == 0 ? 1 : a.Hq;
  launcher.template launch<AdditiveWeightGradientKernel>(heads * divide_up(a.D, 32), p);
}

}  // namespace fastattn::cuda
