// A whole call of the summary: see engine.cuh for what that is.
#pragma once

#include "cuda/hard_engine.cuh"
#include "cuda/launch_summary.cuh"

namespace fastattn::cuda {

inline SummaryKernelParams summary_params(const SummaryParams& summary, const WalkPlan& plan, Arena* arena) {
  const AttentionParams& a = summary.attention;
  SummaryKernelParams p;
  p.walk = walk_params(a, plan);
  p.row_stats = summary.key_mass ? arena->take<F32x4>(a.B * a.Hq * a.Lq) : nullptr;
  p.entropy = static_cast<float*>(summary.entropy);
  p.max_weight = static_cast<float*>(summary.max_weight);
  // A list of the largest scores has keys and weights, also where only one of them is wanted.
  p.top_k = summary.top_weights || summary.top_index ? static_cast<int>(summary.top_k) : 0;
  const int64_t entries = a.B * a.Hq * a.Lq * p.top_k;
  p.top_weights = summary.top_weights ? static_cast<float*>(summary.top_weights) : arena->take<float>(entries);
  p.top_index = summary.top_index ? summary.top_index : arena->take<int64_t>(entries);
  p.key_mass = static_cast<float*>(summary.key_mass);
  p.row_mask = summary.row_mask;
  for (int dim = 0; dim < 3; ++dim) p.row_mask_stride[dim] = summary.row_mask_stride[dim];
  return p;
}

inline size_t summary_workspace(const SummaryParams& summary, const DeviceProperties&) {
  Arena arena{nullptr};
  summary_params(summary, plan_walk(summary.attention), &arena);
  return arena.used;
}

template <class Launcher>
void run_summary(Launcher& launcher, const SummaryParams& summary, const DeviceProperties&, void* workspace) {
  const WalkPlan plan = plan_walk(summary.attention);
  Arena arena{static_cast<char*>(workspace)};
  const SummaryKernelParams p = summary_params(summary, plan, &arena);
  switch (summary.attention.dtype) {
    case DType::kFloat32:
      return launch_summary<DType::kFloat32>(launcher, plan, p);
    case DType::kBFloat16:
      return launch_summary<DType::kBFloat16>(launcher, plan, p);
    default:
      return launch_summary<DType::kFloat16>(launcher, plan, p);
  }
}

}  // namespace fastattn::cuda
