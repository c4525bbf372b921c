#include <new>

#include "core/philox.h"
#include "cpu/attention.h"
#include "torch/engine.h"
#include "torch/errors.h"
#include "torch/parallel.h"

namespace fastattn::engine {
namespace {

template <typename Params>
void call(void (*kernel)(const Params&, const cpu::Parallel&), const Params& params) {
  try {
    kernel(params, torch_parallel());
  } catch (const std::bad_alloc&) {
    runtime_error("there is not enough memory for the kernel's scratch space.");
  }
}

struct DropoutMask {
  uint8_t* keep;  // [B * H, Lq, Lk]
  MaskSizes sizes;
  uint64_t seed, offset;
  double p;
  int workers;
};

void fill_dropout_mask(void* arg, int worker) {
  const DropoutMask& mask = *static_cast<const DropoutMask*>(arg);
  const auto [B, H, Lq, Lk] = mask.sizes;
  const uint32_t threshold = dropout_threshold(mask.p);
  for (int64_t row = worker; row < B * H * Lq; row += mask.workers) {
    for (int64_t j = 0; j < Lk; ++j) {
      mask.keep[row * Lk + j] = mask.p < 1.0 && dropout_keeps(mask.seed, mask.offset, row / Lq, row % Lq, j, threshold);
    }
  }
}

}  // namespace

void check_device(const Device&) {}

void set_rng_state(const int64_t* state, AttentionParams* params) {
  params->seed = static_cast<uint64_t>(state[0]);
  params->offset = static_cast<uint64_t>(state[1]);
}

void attention_forward(const AttentionParams& params, const Device&) { call(cpu::attention_forward, params); }

void attention_backward(const AttentionGradParams& params, const Device&) { call(cpu::attention_backward, params); }

void hard_attention_forward(const HardAttentionParams& params, const Device&) {
  call(cpu::hard_attention_forward, params);
}

void hard_attention_backward(const HardAttentionGradParams& params, const Device&) {
  call(cpu::hard_attention_backward, params);
}

void attention_summary(const SummaryParams& params, const Device&) { call(cpu::attention_summary, params); }

void append_to_cache(const CacheAppendParams& params, const Device&) { call(cpu::append_to_cache, params); }

void dropout_mask(uint8_t* keep, const int64_t* state, const MaskSizes& sizes, double p, const Device&) {
  const cpu::Parallel parallel = torch_parallel();
  DropoutMask mask{keep, sizes, static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1]), p, parallel.threads};
  parallel.run(parallel, mask.workers, fill_dropout_mask, &mask);
}

}  // namespace fastattn::engine
