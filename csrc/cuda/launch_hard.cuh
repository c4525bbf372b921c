// The kernels of hard attention for one dtype: the files that compile kernels instantiate this, and everything else
// sees the declaration.
#pragma once

#include "cuda/hard_backward.cuh"
#include "cuda/hard_forward.cuh"

namespace fastattn::cuda {

template <DType kType, class Launcher>
void launch_hard_forward(Launcher& launcher, const WalkPlan& plan, const HardForwardParams& p) {
  const AttentionParams& a = p.walk.attention;
  const int64_t blocks = plan.row_blocks * plan.splits * a.Hq * a.B;
  switch (plan.dim) {
    case 64:
      launcher.template launch<HardForwardKernel<kType, 64>>(blocks, p);
      break;
    case 128:
      launcher.template launch<HardForwardKernel<kType, 128>>(blocks, p);
      break;
    default:
      launcher.template launch<HardForwardKernel<kType, 256>>(blocks, p);
      break;
  }
  using Finish = HardFinishKernel<kType>;
  launcher.template launch<Finish>(divide_up(a.B * a.Hq * a.Lq, Finish::kRowsPerBlock), p);
}

template <DType kType, class Launcher>
void launch_zero_rows(Launcher& launcher, void* out, const int64_t (&stride)[3], int64_t B, int64_t H, int64_t L,
                      int64_t dim) {
  using Kernel = ZeroRowsKernel<kType>;
  const ZeroRowsParams p = {out, {stride[0], stride[1], stride[2]}, H, L, dim, B * H * L};
  launcher.template launch<Kernel>(divide_up(p.rows, Kernel::kRowsPerBlock), p);
}

template <DType kType, int kDim, class Launcher>
void launch_hard_gradients(Launcher& launcher, const WalkPlan& plan, const HardBackwardParams& p) {
  const AttentionParams& a = p.walk.attention;
  constexpr int kParts = gradient_parts(kType, kDim);
  launcher.template launch<HardKeysKernel<kType, kDim>>(plan.key_blocks * a.Hkv * a.B * kParts, p);
  launcher.template launch<HardQueriesKernel<kType, kDim>>(plan.row_blocks * a.Hq * a.B * kParts, p);
}

template <DType kType, class Launcher>
void launch_hard_backward(Launcher& launcher, const WalkPlan& plan, const HardBackwardParams& p) {
  const AttentionParams& a = p.walk.attention;
  if (p.d_log_prob) {
    launcher.template launch<HardRowsKernel>(divide_up(a.B * a.Hq * a.Lq, HardRowsKernel::kThreads), p);
    switch (plan.dim) {
      case 64:
        launch_hard_gradients<kType, 64>(launcher, plan, p);
        break;
      case 128:
        launch_hard_gradients<kType, 128>(launcher, plan, p);
        break;
      default:
        launch_hard_gradients<kType, 256>(launcher, plan, p);
        break;
    }
  } else {
    launch_zero_rows<kType>(launcher, p.dq, p.dq_stride, a.B, a.Hq, a.Lq, a.D);
    launch_zero_rows<kType>(launcher, p.dk, p.dk_stride, a.B, a.Hkv, a.Lk, a.D);
  }
  if (p.d_o) {
    using Values = HardValuesKernel<kType>;
    launcher.template launch<Values>(divide_up(a.Lk, Values::kKeys) * a.Hkv * a.B, p);
  } else {
    launch_zero_rows<kType>(launcher, p.dv, p.dv_stride, a.B, a.Hkv, a.Lk, a.Dv);
  }
}

}  // namespace fastattn::cuda
