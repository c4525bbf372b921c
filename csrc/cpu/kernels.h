// What one instruction set offers: a table of functions, filled by csrc/cpu/isa_<isa>.cpp and used by dispatch*.cpp.
//
// Work is cut into items there, by plain host functions, so that every level computes the same decomposition; a kernel
// computes one item with scratch memory that it is given. Kernels allocate nothing and call nothing that throws.
#pragma once

#include <cstddef>

#include "core/cache.h"
#include "core/macros.h"
#include "core/params.h"
#include "cpu/levels.h"

namespace fastattn::cpu {

// Query rows that a kernel processes together; score tiles have this many columns.
constexpr int64_t kBlockRows = 64;

// Rows [i0, i1) of one (b, hq), i1 - i0 <= kBlockRows, over the keys [j0, j1) of those there are.
struct ForwardItem {
  int64_t b, hq, i0, i1;
  int64_t j0 = 0, j1 = INT64_MAX;
  float* partial = nullptr;   // see partial_row; null: these are all keys, and the item writes its rows itself
  void* head_copy = nullptr;  // the worker's copy of a head, or null
};

// So many bytes of a head copy must be 0 before the worker's first item.
constexpr size_t kHeadCopyState = 64;

// Up to this many scores a head is a matter of dot products, not of tiles: see small.h.
constexpr int64_t kSmallScoresForward = 36;
FASTATTN_FN bool is_small_forward(const AttentionParams& p) {
  return p.w == nullptr && p.block_table == nullptr && p.k_scale == nullptr && p.Lq * p.Lk <= kSmallScoresForward;
}

// All rows of the query heads [hq0, hq1) of one sequence, which share a key head, over the keys [j0, j1): few rows, at
// most kBlockRows.
struct DecodeItem {
  int64_t b, hq0, hq1;
  int64_t j0, j1;
  float* partial;  // as ForwardItem's
};

// What a part of the keys makes of a row, where several parts share it: o before the division by the row sum, [Dv], and
// 16 floats before its end row maximum and row sum, without the sink. A part has [Hq, Lq] such rows, of one sequence.
FASTATTN_FN int64_t partial_row_floats(const AttentionParams& p) { return (p.Dv + 15) / 16 * 16 + 16; }
FASTATTN_FN float* partial_row(const AttentionParams& p, float* part, int64_t hq, int64_t i) {
  return part + (hq * p.Lq + i) * partial_row_floats(p);
}
FASTATTN_FN float* partial_state(const AttentionParams& p, float* row) { return row + partial_row_floats(p) - 16; }

// Backward works on the keys [j0, j1) of the KV heads of one group. A group is one (b, hkv), or all those that share a
// slice of a bias whose gradient is wanted: their sum is then formed by one worker, in order.
struct BackwardTask {
  int64_t b0, b1, hkv0, hkv1;
  int64_t j0, j1;
  float* dq_partial;  // [B, Hq, Lq padded to kBlockRows, D padded] of this chunk, or null: the task writes dq itself
  float* d_sinks_partial;  // [B, Hq], or null
  float* dw_partial;       // [B, Hq, D padded] of this chunk, or null
  // Not null: the scores' gradient is that of hard attention, and d_o, o and d_lse are not used.
  const HardAttentionGradParams* hard;
};

// The keys [j0, j1) of one (b, hq), whose mass over all rows is summed.
struct KeyMassItem {
  int64_t b, hq, j0, j1;
};

// The new tokens [t0, t1) of sequence b, with all their heads.
struct AppendItem {
  int64_t b, t0, t1;
};

struct KernelTable {
  size_t (*forward_scratch_bytes)(const AttentionParams&);
  // Of a copy of a head that a worker keeps from item to item, for so many items; 0: none is of use.
  size_t (*head_copy_bytes)(const AttentionParams&, int64_t uses);
  void (*forward_item)(const AttentionParams&, const ForwardItem&, void* scratch);

  size_t (*decode_scratch_bytes)(const AttentionParams&);
  void (*decode_item)(const AttentionParams&, const DecodeItem&, void* scratch);
  // Adds up the parts [0, parts) of the rows [i0, i1) of one (b, hq), `part_floats` apart, and writes the rows.
  void (*merge_rows)(const AttentionParams&, const ForwardItem&, float* first_part, int64_t parts, int64_t part_floats);

  size_t (*backward_scratch_bytes)(const AttentionGradParams&, int64_t chunk_keys, bool dq_in_scratch, bool is_hard);
  void (*backward_task)(const AttentionGradParams&, const BackwardTask&, void* scratch);
  // Sums `chunks` partials of rows [i0, i1) of one (b, hq), `chunk_stride` floats apart, and rounds them into dq.
  void (*reduce_dq)(const AttentionGradParams&, int64_t b, int64_t hq, int64_t i0, int64_t i1, const float* partials,
                    int64_t chunks, int64_t chunk_stride);

  size_t (*hard_scratch_bytes)(const HardAttentionParams&);
  void (*hard_item)(const HardAttentionParams&, const ForwardItem&, void* scratch);

  size_t (*summary_scratch_bytes)(const SummaryParams&);
  void (*summary_item)(const SummaryParams&, const ForwardItem&, void* scratch);
  // After the items of all rows, whose row_max and row_sum it reads.
  size_t (*key_mass_scratch_bytes)(const SummaryParams&, int64_t chunk_keys);
  void (*key_mass_item)(const SummaryParams&, const KeyMassItem&, void* scratch);

  size_t (*append_scratch_bytes)(const CacheAppendParams&);
  void (*append_item)(const CacheAppendParams&, const AppendItem&, void* scratch);

  int64_t dq_padding;  // rows of dq partials hold a multiple of this many floats

  // Runs `rounds` rounds of multiply-adds in registers and returns the flop done; for dtype see measure_peak_flops.
  double (*multiply_adds)(DType dtype, int64_t rounds, float* sink);
};

// baseline::kernels and so on.
#define FASTATTN_DECLARE_KERNELS(enumerator, name) \
  namespace name {                                 \
  extern const KernelTable kernels;                \
  }
FASTATTN_LEVELS(FASTATTN_DECLARE_KERNELS)
#undef FASTATTN_DECLARE_KERNELS

}  // namespace fastattn::cpu
