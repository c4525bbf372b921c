// Attention, backward: what depends on a query row alone. The statistics of every row, before the other kernels; and
// the gradient of the sinks, which have a score and no value:
//
//   delta_i = dO_i . o_i - d_lse_i          d_sink_h = -sum over b and i of exp(sink_h - m) / l * delta
#pragma once

#include "cuda/gradient.cuh"

namespace fastattn::cuda {

// One warp = one row [b, hq, i].
template <DType kType>
struct RowStatisticsKernel {
  using Params = BackwardParams;
  static constexpr const char* kName = "attention_backward_rows";
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / 32;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const int lane = thread_index() & 31;
    const int64_t row = block_index() * kRowsPerBlock + (thread_index() >> 5);
    if (row >= a.B * a.Hq * a.Lq) return;
    const int64_t i = row % a.Lq, h = row / a.Lq % a.Hq, b = row / a.Lq / a.Hq;
    const float m = static_cast<const float*>(a.row_max)[row], l = static_cast<const float*>(a.row_sum)[row];
    const bool is_empty = l == 0.0f;
    const bool is_saturated = l == 1.0f;

    float delta = 0.0f;
    if (!is_empty && !is_saturated) {
      const char* o = RowPointer<kElementBytes<kType>>::make(a.o, a.o_stride, b, h).at(i);
      const char* d_o = RowPointer<kElementBytes<kType>>::make(p.grad.d_o, p.grad.d_o_stride, b, h).at(i);
      for (int64_t d = lane; d < a.Dv; d += 32) delta += load_as_float(o, kType, d) * load_as_float(d_o, kType, d);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) delta += shuffle_xor(delta, distance);
    if (lane != 0) return;
    if (!is_empty && p.grad.d_lse) delta -= static_cast<const float*>(p.grad.d_lse)[row];
    F32x4 stats = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (!is_empty) {
      stats = {
          {p.is_plain ? (m + logf(l)) * kLog2E : m, 1.0f / l, delta, is_saturated ? 0.0f : p.constants.keep_scale}};
    }
    p.row_stats[row] = stats;
  }
};

// One CTA = one query head.
struct SinkGradientKernel {
  using Params = BackwardParams;
  static constexpr const char* kName = "attention_backward_sinks";
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = kThreads / 32 * 4;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const int64_t h = block_index();
    const float sink = static_cast<const float*>(a.sinks)[h];
    float sum = 0.0f;
    for (int64_t n = thread_index(); n < a.B * a.Lq; n += kThreads) {
      const int64_t row = (n / a.Lq * a.Hq + h) * a.Lq + n % a.Lq;
      const float m = static_cast<const float*>(a.row_max)[row], l = static_cast<const float*>(a.row_sum)[row];
      // A row that sees nothing does not see the sink either.
      if (l != 0.0f) sum -= expf(sink - m) / l * p.row_stats[row].x[2];
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
    const SharedAddress sums = shared_base();
    if ((thread_index() & 31) == 0) store_shared_f32(sums + static_cast<SharedAddress>(thread_index() / 32 * 4), sum);
    sync_block();  // the warps' sums have arrived
    if (thread_index() != 0) return;
    float total = 0.0f;
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      total += load_shared_f32(sums + static_cast<SharedAddress>(warp * 4));
    }
    static_cast<float*>(p.grad.d_sinks)[h] = total;
  }
};

}  // namespace fastattn::cuda
