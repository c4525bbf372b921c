// A whole call: plans it, lays out its scratch memory, fills in the kernels' params and launches them. Launcher is
// where they run: a stream of a GPU, or the emulator. Has
//
//   template <class Kernel> void launch(int64_t blocks, const typename Kernel::Params& params);
#pragma once

#include "cuda/append.cuh"
#include "cuda/combine.cuh"
#include "cuda/dropout.cuh"
#include "cuda/heuristics.h"
#include "cuda/launch_additive.cuh"
#include "cuda/launch_backward.cuh"
#include "cuda/launch_forward.cuh"
#include "cuda/packed.cuh"

namespace fastattn::cuda {

// Takes pieces of a block of memory in turn, each aligned; with a null block it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used +=
        (static_cast<size_t>(count) * sizeof(T) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return piece;
  }
};

// One formula is to find rows, of a batch and of packed sequences: those have no stride from batch to batch.
inline void drop_batch_stride(const AttentionParams& a, int64_t (&stride)[3]) {
  if (a.cu_seqlens_q != nullptr) stride[0] = 0;
}

// int8 rows are read eight bytes at a time, in place of sixteen.
inline bool cache_is_aligned(const void* tensor, const int64_t (&stride)[3], const float* scale, int64_t bytes) {
  return rows_are_aligned(tensor, stride, scale == nullptr ? bytes : 2);
}

inline ForwardParams forward_params(const AttentionParams& given, const ForwardPlan& plan, Arena* arena) {
  const int64_t bytes = given.dtype == DType::kFloat32 ? 4 : 2;
  ForwardParams p;
  p.attention = given;
  AttentionParams& a = p.attention;
  for (auto* stride : {&a.q_stride, &a.k_stride, &a.v_stride, &a.o_stride}) drop_batch_stride(a, *stride);
  p.constants = score_constants(a);
  p.packed_heads = plan.packed_heads;
  p.row_blocks = plan.row_blocks;
  p.splits = plan.splits;
  p.is_aligned_q = rows_are_aligned(a.q, a.q_stride, bytes);
  p.is_aligned_k = cache_is_aligned(a.k, a.k_stride, a.k_scale, bytes);
  p.is_aligned_v = cache_is_aligned(a.v, a.v_stride, a.v_scale, bytes);
  p.is_aligned_o = rows_are_aligned(a.o, a.o_stride, bytes);
  p.stats = stat_strides(a);
  p.stat_rows = all_rows(a);
  if (plan.splits > 1) {
    const int64_t rows = plan.splits * p.stat_rows;
    p.partial_o = arena->take<float>(rows * a.Dv);
    p.partial_m = arena->take<float>(rows);
    p.partial_l = arena->take<float>(rows);
  }
  return p;
}

inline ForwardPlan forward_plan(const AttentionParams& a, const DeviceProperties& device) {
  if (a.w) return plan_additive_forward(a, device);
  return plan_forward(a, has_modifiers(a) || !has_plain_rows(a), device);
}

inline size_t forward_workspace(const AttentionParams& a, const DeviceProperties& device) {
  Arena arena{nullptr};
  forward_params(a, forward_plan(a, device), &arena);
  return arena.used;
}

inline int64_t uncovered_blocks(const AttentionParams& a) {
  return divide_up(max_i64(a.packed_rows, a.packed_keys), UncoveredKernel::kRowsPerBlock);
}
inline PackedTensor packed_tensor(const AttentionParams& a, void* data, const int64_t (&stride)[3], int64_t heads,
                                  int64_t dim) {
  const int64_t bytes = a.dtype == DType::kFloat32 ? 4 : 2;
  return {data, stride[1] * bytes, stride[2] * bytes, heads, dim * bytes};
}

// Of the forward pass: o and the statistics; or of a split one what CombineKernel makes them of.
inline UncoveredParams uncovered_results(const ForwardParams& p) {
  const AttentionParams& a = p.attention;
  UncoveredParams u;
  u.attention = a;
  if (p.splits > 1) {
    u.minus_infinity[0] = p.partial_m;
    u.zero = p.partial_l;
    u.copies = p.splits;
  } else {
    u.of_rows = packed_tensor(a, a.o, a.o_stride, a.Hq, a.Dv);
    u.minus_infinity[0] = static_cast<float*>(a.lse);
    u.minus_infinity[1] = static_cast<float*>(a.row_max);
    u.zero = static_cast<float*>(a.row_sum);
  }
  return u;
}

inline UncoveredParams uncovered_gradients(const AttentionGradParams& g) {
  const AttentionParams& a = g.forward;
  UncoveredParams u;
  u.attention = a;
  u.of_rows = packed_tensor(a, g.dq, g.dq_stride, a.Hq, a.D);
  u.of_keys[0] = packed_tensor(a, g.dk, g.dk_stride, a.Hkv, a.D);
  u.of_keys[1] = packed_tensor(a, g.dv, g.dv_stride, a.Hkv, a.Dv);
  return u;
}

template <class Launcher>
void run_forward(Launcher& launcher, const AttentionParams& a, const DeviceProperties& device, void* workspace) {
  const ForwardPlan plan = forward_plan(a, device);
  Arena arena{static_cast<char*>(workspace)};
  const ForwardParams p = forward_params(a, plan, &arena);
  const int64_t combine_blocks = divide_up(p.stat_rows, 4);
  ForwardParams combined = p;
  combined.attention = as_one_sequence(p.attention);
  if (a.cu_seqlens_q) launcher.template launch<UncoveredKernel>(uncovered_blocks(a), uncovered_results(p));
  if (a.w) launch_additive_forward(launcher, plan, p);
  switch (a.dtype) {
    case DType::kFloat32:
      if (!a.w) launch_forward<DType::kFloat32>(launcher, plan, p);
      if (plan.splits > 1) launcher.template launch<CombineKernel<DType::kFloat32>>(combine_blocks, combined);
      break;
    case DType::kBFloat16:
      if (!a.w) launch_forward<DType::kBFloat16>(launcher, plan, p);
      if (plan.splits > 1) launcher.template launch<CombineKernel<DType::kBFloat16>>(combine_blocks, combined);
      break;
    default:
      if (!a.w) launch_forward<DType::kFloat16>(launcher, plan, p);
      if (plan.splits > 1) launcher.template launch<CombineKernel<DType::kFloat16>>(combine_blocks, combined);
      break;
  }
}

inline BiasGradientParams backward_params(const AttentionGradParams& given, const BackwardPlan& plan, Arena* arena) {
  const int64_t bytes = given.forward.dtype == DType::kFloat32 ? 4 : 2;
  BiasGradientParams bias;
  BackwardParams& p = bias.backward;
  p.grad = given;
  AttentionGradParams& g = p.grad;
  AttentionParams& a = g.forward;
  for (auto* stride :
       {&a.q_stride, &a.k_stride, &a.v_stride, &a.o_stride, &g.d_o_stride, &g.dq_stride, &g.dk_stride, &g.dv_stride}) {
    drop_batch_stride(a, *stride);
  }
  p.constants = score_constants(a);
  p.is_plain = plan.is_plain;
  p.key_blocks = plan.key_blocks;
  p.row_blocks = plan.row_blocks;
  p.row_stats = arena->take<F32x4>(all_rows(a));
  p.stats = stat_strides(a);
  p.is_aligned_q = rows_are_aligned(a.q, a.q_stride, bytes);
  p.is_aligned_k = rows_are_aligned(a.k, a.k_stride, bytes);
  p.is_aligned_v = rows_are_aligned(a.v, a.v_stride, bytes);
  p.is_aligned_d_o = rows_are_aligned(g.d_o, g.d_o_stride, bytes);
  p.is_aligned_dq = rows_are_aligned(g.dq, g.dq_stride, bytes);
  p.is_aligned_dk = rows_are_aligned(g.dk, g.dk_stride, bytes);
  p.is_aligned_dv = rows_are_aligned(g.dv, g.dv_stride, bytes);
  if (g.d_bias) {
    for (int dim = 0; dim < 4; ++dim) {
      bias.kept[dim] = plan.bias_kept[dim];
      bias.summed[dim] = plan.bias_summed[dim];
    }
    bias.steps = plan.bias_steps;
    bias.chunks = plan.bias_chunks;
    bias.elements = plan.bias_elements;
    bias.sums = bias.chunks > 1 ? arena->take<float>(bias.chunks * bias.elements) : static_cast<float*>(g.d_bias);
  }
  return bias;
}

// For additive scores.
inline AdditiveBackwardParams additive_backward_params(const AttentionGradParams& g, const BackwardPlan& plan,
                                                       Arena* arena) {
  AdditiveBackwardParams p{backward_params(g, plan, arena).backward};
  p.dw_parts = arena->take<float>(g.forward.B * g.forward.Hq * plan.row_blocks * g.forward.D);
  return p;
}

inline size_t backward_workspace(const AttentionGradParams& g, const DeviceProperties& device) {
  Arena arena{nullptr};
  if (g.forward.w) {
    additive_backward_params(g, plan_additive_backward(g.forward), &arena);
  } else {
    backward_params(g, plan_backward(g, has_modifiers(g.forward), device), &arena);
  }
  return arena.used;
}

template <class Launcher>
void run_backward(Launcher& launcher, const AttentionGradParams& g, const DeviceProperties& device, void* workspace) {
  Arena arena{static_cast<char*>(workspace)};
  if (g.forward.w) {
    const BackwardPlan plan = plan_additive_backward(g.forward);
    return launch_additive_backward(launcher, plan, additive_backward_params(g, plan, &arena));
  }
  const BackwardPlan plan = plan_backward(g, has_modifiers(g.forward), device);
  const BiasGradientParams p = backward_params(g, plan, &arena);
  if (g.forward.cu_seqlens_q) {
    launcher.template launch<UncoveredKernel>(uncovered_blocks(g.forward), uncovered_gradients(p.backward.grad));
  }
  switch (g.forward.dtype) {
    case DType::kFloat32:
      return launch_backward<DType::kFloat32>(launcher, plan, p);
    case DType::kBFloat16:
      return launch_backward<DType::kBFloat16>(launcher, plan, p);
    default:
      return launch_backward<DType::kFloat16>(launcher, plan, p);
  }
}

template <class Launcher>
void run_append(Launcher& launcher, const CacheAppendParams& p) {
  launcher.template launch<AppendKernel>(AppendKernel::blocks(p), p);
}

template <class Launcher>
void run_dropout_mask(Launcher& launcher, uint8_t* keep, const int64_t* rng_state, int64_t B, int64_t H, int64_t Lq,
                      int64_t Lk, double probability) {
  DropoutMaskParams p;
  p.keep = keep;
  p.rng_state = rng_state;
  p.rows = B * H * Lq;
  p.Lq = Lq;
  p.Lk = Lk;
  p.drops_all = probability >= 1.0;
  p.threshold = p.drops_all ? 0u : dropout_threshold(probability);
  launcher.template launch<DropoutMaskKernel>(divide_up(p.rows * divide_up(Lk, 4), DropoutMaskKernel::kThreads), p);
}

}  // namespace fastattn::cuda
