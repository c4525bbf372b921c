// What the parts of a split forward pass found, merged into one result: exact, because every part left its own maximum
// and sum. One warp = one row [b, hq, i].
//
//   m = max_s m_s      l = sum_s l_s exp(m_s - m)      o = sum_s exp(m_s - m) o_s / l
#pragma once

#include "cuda/finish.cuh"
#include "cuda/forward.cuh"

namespace fastattn::cuda {

template <DType kType>
FASTATTN_DEVICE void store_rounded(void* row, int64_t at, float x) {
  if constexpr (kType == DType::kFloat32) {
    static_cast<float*>(row)[at] = x;
  } else {
    static_cast<uint16_t*>(row)[at] = static_cast<uint16_t>(pack_pair<kType>(x, 0.0f));
  }
}

template <DType kType>
struct CombineKernel {
  using Params = ForwardParams;
  static constexpr const char* kName = "attention_combine";
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / 32;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.attention;
    const int lane = thread_index() & 31;
    const int64_t rows = a.B * a.Hq * a.Lq;
    const int64_t row = block_index() * kRowsPerBlock + (thread_index() >> 5);
    if (row >= rows) return;
    const int64_t i = row % a.Lq, h = row / a.Lq % a.Hq, b = row / a.Lq / a.Hq;

    SoftmaxState<float> state = {-kInfinity, 0.0f};
    for (int split = 0; split < p.splits; ++split) {
      const int64_t at = split * rows + row;
      state = softmax_merge(state, SoftmaxState<float>{p.partial_m[at], p.partial_l[at]});
    }
    const FinishedRow finished = finish_row(a, state, static_cast<int>(h));
    if (lane == 0) write_statistics(a, finished, row);

    const float factor = finished.factor * p.constants.keep_scale;
    char* const out =
        static_cast<char*>(a.o) + (b * a.o_stride[0] + h * a.o_stride[1] + i * a.o_stride[2]) * kElementBytes<kType>;
    for (int64_t d = lane; d < a.Dv; d += 32) {
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split) {
        const int64_t at = split * rows + row;
        const float weight = softmax_weight(p.partial_m[at], state.m);
        // A part without a visible key weighs nothing.
        if (weight != 0.0f) sum += weight * p.partial_o[at * a.Dv + d];
      }
      store_rounded<kType>(out, d, sum * factor);
    }
  }
};

}  // namespace fastattn::cuda
