// The kernel table of one instruction set. Included last by every isa_<isa>.cpp.
//
// A level that adds little to another one is compiled for that little alone, and hands the rest on: it defines
// FASTATTN_REST as the other level. The level with bfloat16 dot products has kernels for bfloat16 and no others.
#pragma once

#include "cpu/backward.h"
#include "cpu/cache.h"
#include "cpu/decode.h"
#include "cpu/forward.h"
#include "cpu/hard.h"
#include "cpu/kernels.h"
#include "cpu/summary.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Calls f.operator()<Operands>() with the operands that serve the call. Additive scores are float arithmetic.
template <class F>
FASTATTN_FN auto with_operands(const AttentionParams& p, const F& f) {
#if FASTATTN_BF16_DOT
  (void)p;
  return f.template operator()<Bf16Operands>();
#else
  switch (p.dtype) {
    case DType::kBFloat16:
      return f.template operator()<FloatOperands<BFloat16>>();
    case DType::kFloat16:
      return f.template operator()<FloatOperands<Float16>>();
    default:
      return f.template operator()<FloatOperands<Float32>>();
  }
#endif
}

size_t forward_scratch_bytes(const AttentionParams& p) {
  return with_operands(p, [&]<class Operands>() {
    size_t bytes = 0;
    forward_scratch<Operands>(p, nullptr, &bytes);
    return bytes;
  });
}

size_t head_copy_bytes(const AttentionParams& p, int64_t uses) {
  return with_operands(p, [&]<class Operands>() { return HeadCopy<Operands>::bytes(p, uses); });
}

void forward_item(const AttentionParams& p, const ForwardItem& item, void* scratch) {
  with_operands(p, [&]<class Operands>() { forward_item_as<Operands>(p, item, static_cast<char*>(scratch)); });
}

size_t decode_scratch_bytes(const AttentionParams& p) {
  size_t bytes = 0;
  decode_scratch(p, nullptr, &bytes);
  return bytes;
}

void decode_item(const AttentionParams& p, const DecodeItem& item, void* scratch) {
  char* memory = static_cast<char*>(scratch);
#if FASTATTN_BF16_DOT
  if (p.k_scale != nullptr) return decode_item_as<Int8CacheKeys>(p, item, memory);
  decode_item_as<Bf16Keys>(p, item, memory);
#else
  if (p.k_scale != nullptr) return decode_item_as<FloatKeys<Int8>>(p, item, memory);
  switch (p.dtype) {
    case DType::kBFloat16:
      return decode_item_as<FloatKeys<BFloat16>>(p, item, memory);
    case DType::kFloat16:
      return decode_item_as<FloatKeys<Float16>>(p, item, memory);
    default:
      return decode_item_as<FloatKeys<Float32>>(p, item, memory);
  }
#endif
}

size_t backward_scratch_bytes(const AttentionGradParams& gp, int64_t chunk_keys, bool dq_in_scratch, bool is_hard) {
  return with_operands(gp.forward, [&]<class Operands>() {
    size_t bytes = 0;
    backward_scratch<Operands>(gp, chunk_keys, dq_in_scratch, is_hard, nullptr, &bytes);
    return bytes;
  });
}

void backward_task(const AttentionGradParams& gp, const BackwardTask& task, void* scratch) {
  with_operands(gp.forward,
                [&]<class Operands>() { backward_task_as<Operands>(gp, task, static_cast<char*>(scratch)); });
}

void reduce_dq(const AttentionGradParams& gp, int64_t b, int64_t hq, int64_t i0, int64_t i1, const float* partials,
               int64_t chunks, int64_t chunk_stride) {
  with_operands(gp.forward,
                [&]<class Operands>() { reduce_dq_as<Operands>(gp, b, hq, i0, i1, partials, chunks, chunk_stride); });
}

size_t hard_scratch_bytes(const HardAttentionParams& hp) {
  return with_operands(hp.attention, [&]<class Operands>() {
    size_t bytes = 0;
    draw_scratch<Operands>(hp.attention, nullptr, &bytes);
    return bytes;
  });
}

void hard_item(const HardAttentionParams& hp, const ForwardItem& item, void* scratch) {
  with_operands(hp.attention, [&]<class Operands>() { hard_item_as<Operands>(hp, item, static_cast<char*>(scratch)); });
}

size_t summary_scratch_bytes(const SummaryParams& sp) {
  return with_operands(sp.attention, [&]<class Operands>() {
    size_t bytes = 0;
    summary_scratch<Operands>(sp, nullptr, &bytes);
    return bytes;
  });
}

void summary_item(const SummaryParams& sp, const ForwardItem& item, void* scratch) {
  with_operands(sp.attention,
                [&]<class Operands>() { summary_item_as<Operands>(sp, item, static_cast<char*>(scratch)); });
}

size_t key_mass_scratch_bytes(const SummaryParams& sp, int64_t chunk_keys) {
  return with_operands(sp.attention, [&]<class Operands>() {
    size_t bytes = 0;
    key_mass_scratch<Operands>(sp, chunk_keys, nullptr, &bytes);
    return bytes;
  });
}

void key_mass_item(const SummaryParams& sp, const KeyMassItem& item, void* scratch) {
  with_operands(sp.attention,
                [&]<class Operands>() { key_mass_item_as<Operands>(sp, item, static_cast<char*>(scratch)); });
}

size_t append_scratch_bytes(const CacheAppendParams& p) {
  size_t bytes = 0;
  append_scratch(p, nullptr, &bytes);
  return bytes;
}

void append_item(const CacheAppendParams& p, const AppendItem& item, void* scratch) {
  char* memory = static_cast<char*>(scratch);
#if FASTATTN_BF16_DOT
  append_item_as<BFloat16>(p, item, memory);
#else
  switch (p.dtype) {
    case DType::kBFloat16:
      return append_item_as<BFloat16>(p, item, memory);
    case DType::kFloat16:
      return append_item_as<Float16>(p, item, memory);
    default:
      return append_item_as<Float32>(p, item, memory);
  }
#endif
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
double multiply_adds(DType, int64_t rounds, float* sink) {
#if FASTATTN_BF16_DOT
  return multiply_adds_as<Bf16Pair>(rounds, 4.0, sink);
#else
  return multiply_adds_as<Float32Unit>(rounds, 2.0, sink);
#endif
}

// What the table has for kOther: this level's kMine or, for the calls that it has no kernels for, the other level's.
template <auto kOther, auto kMine>
struct Chosen;
#ifdef FASTATTN_REST
FASTATTN_FN bool adds_to(DType dtype) { return dtype == DType::kBFloat16; }
FASTATTN_FN bool adds_to(const AttentionParams& p) { return adds_to(p.dtype) && p.w == nullptr; }
FASTATTN_FN bool adds_to(const AttentionGradParams& gp) { return adds_to(gp.forward); }
FASTATTN_FN bool adds_to(const HardAttentionParams& hp) { return adds_to(hp.attention); }
FASTATTN_FN bool adds_to(const SummaryParams& sp) { return adds_to(sp.attention); }
FASTATTN_FN bool adds_to(const CacheAppendParams& p) { return adds_to(p.dtype); }

template <class Result, class First, class... Others, Result (*KernelTable::*kOther)(First, Others...),
          Result (*kMine)(First, Others...)>
struct Chosen<kOther, kMine> {
  static Result call(First first, Others... others) {
    return adds_to(first) ? kMine(first, others...) : (FASTATTN_REST::kernels.*kOther)(first, others...);
  }
  static constexpr auto function = call;
};
#else
template <class Function, Function* KernelTable::* kOther, Function* kMine>
struct Chosen<kOther, kMine> {
  static constexpr auto function = kMine;
};
#endif
template <auto kOther, auto kMine>
constexpr auto chosen = Chosen<kOther, kMine>::function;

}  // namespace

const KernelTable kernels = {
    chosen<&KernelTable::forward_scratch_bytes, forward_scratch_bytes>,
    chosen<&KernelTable::head_copy_bytes, head_copy_bytes>,
    chosen<&KernelTable::forward_item, forward_item>,
    chosen<&KernelTable::decode_scratch_bytes, decode_scratch_bytes>,
    chosen<&KernelTable::decode_item, decode_item>,
    chosen<&KernelTable::merge_rows, merge_rows>,
    chosen<&KernelTable::backward_scratch_bytes, backward_scratch_bytes>,
    chosen<&KernelTable::backward_task, backward_task>,
    chosen<&KernelTable::reduce_dq, reduce_dq>,
    chosen<&KernelTable::hard_scratch_bytes, hard_scratch_bytes>,
    chosen<&KernelTable::hard_item, hard_item>,
    chosen<&KernelTable::summary_scratch_bytes, summary_scratch_bytes>,
    chosen<&KernelTable::summary_item, summary_item>,
    chosen<&KernelTable::key_mass_scratch_bytes, key_mass_scratch_bytes>,
    chosen<&KernelTable::key_mass_item, key_mass_item>,
    chosen<&KernelTable::append_scratch_bytes, append_scratch_bytes>,
    chosen<&KernelTable::append_item, append_item>,
    2 * kLanes,
    chosen<&KernelTable::multiply_adds, multiply_adds>,
};

}  // namespace fastattn::cpu::FASTATTN_ISA
