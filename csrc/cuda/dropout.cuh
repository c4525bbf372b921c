// The mask that attention's dropout draws, written out: [B, H, Lq, Lk], 1 = kept. One thread = four neighbouring keys,
// on which one Philox call decides.
#pragma once

#include "core/philox.h"
#include "cuda/ptx.cuh"

namespace fastattn::cuda {

struct DropoutMaskParams {
  uint8_t* keep = nullptr;
  const int64_t* rng_state = nullptr;
  int64_t rows = 0;  // B * H * Lq
  int64_t Lq = 0, Lk = 0;
  uint32_t threshold = 0;
  bool drops_all = false;
};

struct DropoutMaskKernel {
  using Params = DropoutMaskParams;
  static constexpr const char* kName = "dropout_mask";
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;

  FASTATTN_DEVICE void run(const Params& p) {
    const int64_t quads = (p.Lk + 3) / 4;
    const int64_t n = block_index() * kThreads + thread_index();
    if (n >= p.rows * quads) return;
    const int64_t row = n / quads, quad = n % quads;
    const PhiloxWords words = philox4x32(static_cast<uint64_t>(p.rng_state[0]), static_cast<uint32_t>(quad),
                                         static_cast<uint32_t>(row % p.Lq), static_cast<uint32_t>(row / p.Lq),
                                         static_cast<uint32_t>(p.rng_state[1]));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t j = 4 * quad + e;
      if (j < p.Lk) p.keep[row * p.Lk + j] = !p.drops_all && words.w[e] >= p.threshold;
    }
  }
};

}  // namespace fastattn::cuda
