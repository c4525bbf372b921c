// The kernel table of one instruction set. Included last by every isa_<isa>.cpp.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/hard.h"
#include "cpu/kernels.h"
#include "cpu/summary.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Calls f.run<Operands>() with the operands that serve the call. Additive scores are float arithmetic.
template <class F>
FASTATTN_FN auto with_operands(const AttentionParams& p, const F& f) {
  switch (p.dtype) {
    case DType::kBFloat16:
#if FASTATTN_BF16_DOT
      if (p.w == nullptr) return f.template run<Bf16Operands>();
#endif
      return f.template run<FloatOperands<BFloat16>>();
    case DType::kFloat16:
      return f.template run<FloatOperands<Float16>>();
    default:
      return f.template run<FloatOperands<Float32>>();
  }
}

struct ForwardBytes {
  const AttentionParams& p;
  template <class Operands>
  size_t run() const {
    size_t bytes = 0;
    forward_scratch<Operands>(p, nullptr, &bytes);
    return bytes;
  }
};
size_t forward_scratch_bytes(const AttentionParams& p) { return with_operands(p, ForwardBytes{p}); }

struct ForwardRun {
  const AttentionParams& p;
  const ForwardItem& item;
  char* scratch;
  template <class Operands>
  void run() const {
    forward_item_as<Operands>(p, item, scratch);
  }
};
void forward_item(const AttentionParams& p, const ForwardItem& item, void* scratch) {
  with_operands(p, ForwardRun{p, item, static_cast<char*>(scratch)});
}

struct BackwardBytes {
  const AttentionGradParams& p;
  int64_t chunk_keys;
  bool dq_in_scratch;
  template <class Operands>
  size_t run() const {
    size_t bytes = 0;
    backward_scratch<Operands>(p, chunk_keys, dq_in_scratch, nullptr, &bytes);
    return bytes;
  }
};
size_t backward_scratch_bytes(const AttentionGradParams& p, int64_t chunk_keys, bool dq_in_scratch) {
  return with_operands(p.forward, BackwardBytes{p, chunk_keys, dq_in_scratch});
}

struct BackwardRun {
  const AttentionGradParams& p;
  const BackwardTask& task;
  char* scratch;
  template <class Operands>
  void run() const {
    backward_task_as<Operands>(p, task, scratch);
  }
};
void backward_task(const AttentionGradParams& p, const BackwardTask& task, void* scratch) {
  with_operands(p.forward, BackwardRun{p, task, static_cast<char*>(scratch)});
}

struct ReduceDq {
  const AttentionGradParams& p;
  int64_t b, hq, i0, i1;
  const float* partials;
  int64_t chunks, chunk_stride;
  template <class Operands>
  void run() const {
    reduce_dq_as<Operands>(p, b, hq, i0, i1, partials, chunks, chunk_stride);
  }
};
void reduce_dq(const AttentionGradParams& p, int64_t b, int64_t hq, int64_t i0, int64_t i1, const float* partials,
               int64_t chunks, int64_t chunk_stride) {
  with_operands(p.forward, ReduceDq{p, b, hq, i0, i1, partials, chunks, chunk_stride});
}

struct HardBytes {
  const HardAttentionParams& p;
  template <class Operands>
  size_t run() const {
    size_t bytes = 0;
    draw_scratch<Operands>(p.attention, nullptr, &bytes);
    return bytes;
  }
};
size_t hard_scratch_bytes(const HardAttentionParams& p) { return with_operands(p.attention, HardBytes{p}); }

struct HardRun {
  const HardAttentionParams& p;
  const ForwardItem& item;
  char* scratch;
  template <class Operands>
  void run() const {
    hard_item_as<Operands>(p, item, scratch);
  }
};
void hard_item(const HardAttentionParams& p, const ForwardItem& item, void* scratch) {
  with_operands(p.attention, HardRun{p, item, static_cast<char*>(scratch)});
}

struct SummaryBytes {
  const SummaryParams& p;
  template <class Operands>
  size_t run() const {
    size_t bytes = 0;
    summary_scratch<Operands>(p, nullptr, &bytes);
    return bytes;
  }
};
size_t summary_scratch_bytes(const SummaryParams& p) { return with_operands(p.attention, SummaryBytes{p}); }

struct SummaryRun {
  const SummaryParams& p;
  const ForwardItem& item;
  char* scratch;
  template <class Operands>
  void run() const {
    summary_item_as<Operands>(p, item, scratch);
  }
};
void summary_item(const SummaryParams& p, const ForwardItem& item, void* scratch) {
  with_operands(p.attention, SummaryRun{p, item, static_cast<char*>(scratch)});
}

struct KeyMassBytes {
  const SummaryParams& p;
  int64_t chunk_keys;
  template <class Operands>
  size_t run() const {
    size_t bytes = 0;
    key_mass_scratch<Operands>(p, chunk_keys, nullptr, &bytes);
    return bytes;
  }
};
size_t key_mass_scratch_bytes(const SummaryParams& p, int64_t chunk_keys) {
  return with_operands(p.attention, KeyMassBytes{p, chunk_keys});
}

struct KeyMassRun {
  const SummaryParams& p;
  const KeyMassItem& item;
  char* scratch;
  template <class Operands>
  void run() const {
    key_mass_item_as<Operands>(p, item, scratch);
  }
};
void key_mass_item(const SummaryParams& p, const KeyMassItem& item, void* scratch) {
  with_operands(p.attention, KeyMassRun{p, item, static_cast<char*>(scratch)});
}

// Independent chains of multiply-adds, as many as the register file holds beside their operands: the peak that the
// benchmark compares with.
template <class Unit>
double multiply_adds_as(int64_t rounds, double flop_per_lane, float* sink) {
  constexpr int kChains = kPanelVectors == 4 ? 24 : 12;
  Vf acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = vset(static_cast<float>(c));
  alignas(64) uint32_t zeros[kLanes] = {};
  asm volatile("" : : "r"(zeros) : "memory");  // the compiler must not know the operands
  const auto a = Unit::load(reinterpret_cast<const char*>(zeros));
  const auto b = Unit::load(reinterpret_cast<const char*>(zeros));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) acc[c] = Unit::multiply_add(a, b, acc[c]);
  }
  Vf sum = vzero();
  for (int c = 0; c < kChains; ++c) sum = vadd(sum, acc[c]);
  *sink = vreduce_add(sum);
  return flop_per_lane * kLanes * kChains * static_cast<double>(rounds);
}
double multiply_adds(DType dtype, int64_t rounds, float* sink) {
#if FASTATTN_BF16_DOT
  if (dtype == DType::kBFloat16) return multiply_adds_as<Bf16Pair>(rounds, 4.0, sink);
#endif
  (void)dtype;
  return multiply_adds_as<Float32Unit>(rounds, 2.0, sink);
}

}  // namespace

const KernelTable kernels = {
    forward_scratch_bytes, forward_item, backward_scratch_bytes, backward_task, reduce_dq,
    hard_scratch_bytes,    hard_item,    summary_scratch_bytes,  summary_item,  key_mass_scratch_bytes,
    key_mass_item,         2 * kLanes,   multiply_adds,
};

}  // namespace fastattn::cpu::FASTATTN_ISA
