// A whole call of hard attention: see engine.cuh for what that is.
#pragma once

#include "cuda/engine.cuh"
#include "cuda/launch_hard.cuh"

namespace fastattn::cuda {

inline WalkParams walk_params(const AttentionParams& a, const WalkPlan& plan) {
  const int64_t bytes = a.dtype == DType::kFloat32 ? 4 : 2;
  WalkParams p;
  p.attention = a;
  p.constants = score_constants(a);
  p.row_blocks = plan.row_blocks;
  p.key_blocks = plan.key_blocks;
  p.splits = plan.splits;
  p.is_aligned_q = rows_are_aligned(a.q, a.q_stride, bytes);
  p.is_aligned_k = rows_are_aligned(a.k, a.k_stride, bytes);
  return p;
}

inline HardForwardParams hard_forward_params(const HardAttentionParams& hard, const WalkPlan& plan, Arena* arena) {
  const AttentionParams& a = hard.attention;
  const int64_t bytes = a.dtype == DType::kFloat32 ? 4 : 2, rows = plan.splits * a.B * a.Hq * a.Lq;
  HardForwardParams p;
  p.walk = walk_params(a, plan);
  p.is_sampled = hard.is_sampled;
  p.parts = arena->take<F32x4>(rows);
  p.part_key = arena->take<int32_t>(rows);
  p.index = hard.index;
  p.log_prob = static_cast<float*>(hard.log_prob);
  p.copies_chunks = rows_are_aligned(a.v, a.v_stride, bytes) && rows_are_aligned(a.o, a.o_stride, bytes);
  return p;
}

inline size_t hard_forward_workspace(const HardAttentionParams& hard, const DeviceProperties& device) {
  Arena arena{nullptr};
  hard_forward_params(hard, plan_hard_forward(hard.attention, device), &arena);
  return arena.used;
}

template <class Launcher>
void run_hard_forward(Launcher& launcher, const HardAttentionParams& hard, const DeviceProperties& device,
                      void* workspace) {
  const WalkPlan plan = plan_hard_forward(hard.attention, device);
  Arena arena{static_cast<char*>(workspace)};
  const HardForwardParams p = hard_forward_params(hard, plan, &arena);
  switch (hard.attention.dtype) {
    case DType::kFloat32:
      return launch_hard_forward<DType::kFloat32>(launcher, plan, p);
    case DType::kBFloat16:
      return launch_hard_forward<DType::kBFloat16>(launcher, plan, p);
    default:
      return launch_hard_forward<DType::kFloat16>(launcher, plan, p);
  }
}

inline HardBackwardParams hard_backward_params(const HardAttentionGradParams& g, const WalkPlan& plan, Arena* arena) {
  const AttentionParams& a = g.forward;
  const int64_t bytes = a.dtype == DType::kFloat32 ? 4 : 2;
  HardBackwardParams p;
  p.walk = walk_params(a, plan);
  p.row_stats = arena->take<F32x4>(g.d_log_prob ? a.B * a.Hq * a.Lq : 0);
  p.index = g.index;
  p.d_log_prob = static_cast<const float*>(g.d_log_prob);
  p.d_o = g.d_o;
  p.dq = g.dq;
  p.dk = g.dk;
  p.dv = g.dv;
  for (int dim = 0; dim < 3; ++dim) {
    p.d_o_stride[dim] = g.d_o_stride[dim];
    p.dq_stride[dim] = g.dq_stride[dim];
    p.dk_stride[dim] = g.dk_stride[dim];
    p.dv_stride[dim] = g.dv_stride[dim];
  }
  p.is_aligned_dq = rows_are_aligned(g.dq, g.dq_stride, bytes);
  p.is_aligned_dk = rows_are_aligned(g.dk, g.dk_stride, bytes);
  return p;
}

inline size_t hard_backward_workspace(const HardAttentionGradParams& g, const DeviceProperties&) {
  Arena arena{nullptr};
  hard_backward_params(g, plan_walk(g.forward), &arena);
  return arena.used;
}

template <class Launcher>
void run_hard_backward(Launcher& launcher, const HardAttentionGradParams& g, const DeviceProperties&, void* workspace) {
  const WalkPlan plan = plan_walk(g.forward);
  Arena arena{static_cast<char*>(workspace)};
  const HardBackwardParams p = hard_backward_params(g, plan, &arena);
  switch (g.forward.dtype) {
    case DType::kFloat32:
      return launch_hard_backward<DType::kFloat32>(launcher, plan, p);
    case DType::kBFloat16:
      return launch_hard_backward<DType::kBFloat16>(launcher, plan, p);
    default:
      return launch_hard_backward<DType::kFloat16>(launcher, plan, p);
  }
}

}  // namespace fastattn::cuda
