// The CPU engine's interface: what csrc/torch and the test module call. Arguments have been checked by the caller.
#pragma once

#include "core/cache.h"
#include "core/params.h"
#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace fastattn::cpu {

// The levels of this architecture, from 0, in priority order; a level includes those before it.
#define FASTATTN_ENUMERATOR(enumerator, name) enumerator,
enum class Isa : int32_t { FASTATTN_LEVELS(FASTATTN_ENUMERATOR) kEnd };
#undef FASTATTN_ENUMERATOR
constexpr int kIsaCount = static_cast<int>(Isa::kEnd);

const char* isa_name(Isa isa);                   // as in cpu/levels.h
bool isa_from_name(const char* name, Isa* isa);  // false: no such level
bool isa_supported(Isa isa);                     // by this build, this processor and this operating system
Isa best_isa();                                  // the highest supported level
Isa active_isa();                                // the level in use; best_isa() until set_active_isa is called
void set_active_isa(Isa isa);                    // a supported level; not while a kernel runs

// o, and lse, row_max and row_sum where asked for. Throws std::bad_alloc when there is no memory for scratch.
void attention_forward(const AttentionParams& params, const Parallel& parallel);

// dq, dk, dv, and d_bias, d_sinks and dw where asked for; every element of each is written.
void attention_backward(const AttentionGradParams& params, const Parallel& parallel);

// o, index and log_prob, and row_max and row_sum where asked for.
void hard_attention_forward(const HardAttentionParams& params, const Parallel& parallel);

// dq, dk and dv.
void hard_attention_backward(const HardAttentionGradParams& params, const Parallel& parallel);

// Whatever of the summary is asked for.
void attention_summary(const SummaryParams& params, const Parallel& parallel);

// new_lengths, k and v in the cache, and rotated_q where there is a rotary embedding.
void append_to_cache(const CacheAppendParams& params, const Parallel& parallel);

// Peak rates for the benchmark, in flop per second summed over `parallel.threads`: multiply-adds in registers at the
// active level, for float32 operands or (pairs: where the level has a bfloat16 dot product) for bfloat16 ones.
double measure_peak_flops(DType dtype, const Parallel& parallel);

// The sum of all words of two buffers: what it takes to read them, and hardly more.
struct Words {
  const uint64_t* data;
  int64_t count;
};
uint64_t sum_words(const Words (&buffers)[2], const Parallel& parallel);

}  // namespace fastattn::cpu
