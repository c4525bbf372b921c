// Where a sequence lies: in a padded batch, or among packed ones, where it is cut out as a problem of its own; and
// where its keys lie, in rows of its own or in pages.
#pragma once

#include "core/macros.h"
#include "core/mask.h"
#include "core/params.h"

namespace fastattn {

// Index into lse, row_max, row_sum and d_lse. Of packed sequences p is one sequence's view, its pointers moved there.
FASTATTN_FN int64_t stat_index(const AttentionParams& p, int64_t b, int64_t hq, int64_t i) {
  return (b * p.Hq + hq) * (p.packed_rows != 0 ? p.packed_rows : p.Lq) + i;
}

// The counter by which dropout tells heads apart.
FASTATTN_FN int64_t dropout_head(const AttentionParams& p, int64_t b, int64_t hq) {
  return (p.first_batch + b) * p.Hq + hq;
}

// Rows [first_row, first_row + rows) and keys [first_key, first_key + keys) of what was packed.
struct PackedSequence {
  int64_t first_row = 0, rows = 0;
  int64_t first_key = 0, keys = 0;
};

// Sequence b. On a GPU nobody can check cu_seqlens without waiting for the device: there, what leads out of the
// tensors, or says more than Lq rows or Lk keys, counts as the nearest that does not.
FASTATTN_FN PackedSequence packed_sequence(const AttentionParams& p, int64_t b) {
  PackedSequence s;
  s.first_row = clamp_i64(p.cu_seqlens_q[b], 0, p.packed_rows);
  s.rows = clamp_i64(p.cu_seqlens_q[b + 1] - s.first_row, 0, min_i64(p.Lq, p.packed_rows - s.first_row));
  s.first_key = clamp_i64(p.cu_seqlens_k[b], 0, p.packed_keys);
  s.keys = clamp_i64(p.cu_seqlens_k[b + 1] - s.first_key, 0, min_i64(p.Lk, p.packed_keys - s.first_key));
  return s;
}

// `count` keys in rows next to one another: the first is row `row` of batch entry (of a paged cache: of page) `batch`
// of k, v and their scales.
struct KeyRun {
  int64_t batch, row, count;
};

// As many of the keys [j, j1) of sequence b as follow key j without a gap, j < j1. Of a block table only the entries of
// these keys are read.
FASTATTN_FN KeyRun key_run(const AttentionParams& p, int64_t b, int64_t j, int64_t j1) {
  if (p.block_table == nullptr) return {b, j, j1 - j};
  const int64_t page = j / p.page_size, row = j - page * p.page_size;
  return {p.block_table[b * p.block_table_stride + page], row, min_i64(p.page_size - row, j1 - j)};
}

}  // namespace fastattn
