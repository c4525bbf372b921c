// Mask geometry: which keys a query row may see, and which tiles of the score matrix that leaves.
//
// Row i sees key j exactly when lo(i) <= j < hi(i). Causal masks, sliding windows and key lengths are all such
// intervals, and lo and hi never decrease with i. Everything else on this page follows from those two functions, for
// the forward pass (the keys of a block of rows) and, transposed, for the backward pass (the rows of a block of keys).
#pragma once

#include "core/macros.h"
#include "core/params.h"

namespace fastattn {

struct MaskGeometry {
  int64_t Lq = 0;
  int64_t Lk = 0;      // keys that exist for this sequence, at most the tensor's Lk
  int64_t offset = 0;  // row i sits on the diagonal at key i + offset
  int64_t left = 0;    // keys visible before the diagonal
  int64_t right = 0;   // and after it
};

// Half-open ranges of keys for a block of rows (or of rows for a block of keys): [begin, end) holds everything visible,
// and between full_begin and full_end all rows see all keys. full_begin >= full_end means that no key is fully visible.
struct TileRange {
  int64_t begin = 0, end = 0;
  int64_t full_begin = 0, full_end = 0;
};

enum class TileKind : int32_t { kSkip, kPartial, kFull };

FASTATTN_FN int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_FN int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTATTN_FN int64_t clamp_i64(int64_t x, int64_t lo, int64_t hi) { return max_i64(lo, min_i64(x, hi)); }

// The geometry of a sequence of Lq rows and Lk keys, neither more than p has. Windows are limited to p.Lq + p.Lk,
// beyond which nothing changes, so that no sum overflows.
FASTATTN_FN MaskGeometry mask_geometry(const AttentionParams& p, int64_t Lq, int64_t Lk) {
  MaskGeometry g;
  g.Lq = Lq;
  g.Lk = Lk;
  g.offset = p.causal == Causal::kTopLeft ? 0 : g.Lk - g.Lq;
  const int64_t unlimited = p.Lq + p.Lk;
  g.left = p.window_left == kUnlimited ? unlimited : min_i64(p.window_left, unlimited);
  g.right = p.window_right == kUnlimited ? unlimited : min_i64(p.window_right, unlimited);
  if (p.causal != Causal::kNone) g.right = 0;
  return g;
}

// The geometry of sequence b. kv_lengths[b] is clamped: on a GPU nobody can check it without waiting for the device,
// and it must not lead a kernel out of the tensors.
FASTATTN_FN MaskGeometry mask_geometry(const AttentionParams& p, int64_t b) {
  return mask_geometry(p, p.Lq, p.kv_lengths ? clamp_i64(p.kv_lengths[b], 0, p.Lk) : p.Lk);
}

// First visible key of row i, and one past the last; lo >= hi means that the row sees nothing.
FASTATTN_FN int64_t lo(const MaskGeometry& g, int64_t i) { return clamp_i64(i + g.offset - g.left, 0, g.Lk); }
FASTATTN_FN int64_t hi(const MaskGeometry& g, int64_t i) { return clamp_i64(i + g.offset + g.right + 1, 0, g.Lk); }

FASTATTN_FN bool keep(const MaskGeometry& g, int64_t i, int64_t j) { return lo(g, i) <= j && j < hi(g, i); }

// The first key that geometry and boolean mask leave row i of head (b, hq), whatever its score; for rows that are known
// to see one.
FASTATTN_FN int64_t first_visible_key(const AttentionParams& p, const MaskGeometry& g, int64_t b, int64_t hq,
                                      int64_t i) {
  int64_t j = lo(g, i);
  if (p.mask == nullptr) return j;
  const int64_t* stride = p.mask_stride;
  const uint8_t* row = p.mask + b * stride[0] + hq * stride[1] + i * stride[2];
  while (j + 1 < hi(g, i) && row[j * stride[3]] == 0) ++j;
  return j;
}

// The keys that rows [i0, i1) see, i0 < i1.
FASTATTN_FN TileRange key_range(const MaskGeometry& g, int64_t i0, int64_t i1) {
  return {lo(g, i0), max_i64(lo(g, i0), hi(g, i1 - 1)), lo(g, i1 - 1), hi(g, i0)};
}

// The first row whose hi exceeds j, and one past the last row whose lo is at most j; both within [0, Lq].
FASTATTN_FN int64_t first_row_before_hi(const MaskGeometry& g, int64_t j) {
  return clamp_i64(j - g.offset - g.right, 0, g.Lq);
}
FASTATTN_FN int64_t end_row_after_lo(const MaskGeometry& g, int64_t j) {
  return clamp_i64(j - g.offset + g.left + 1, 0, g.Lq);
}

// The rows that see any of the keys [j0, j1), j0 < j1 <= Lk; between full_begin and full_end they see all of them.
FASTATTN_FN TileRange row_range(const MaskGeometry& g, int64_t j0, int64_t j1) {
  const int64_t begin = first_row_before_hi(g, j0);
  return {begin, max_i64(begin, end_row_after_lo(g, j1 - 1)), first_row_before_hi(g, j1 - 1), end_row_after_lo(g, j0)};
}

// What rows [i0, i1) see of keys [j0, j1), both non-empty.
FASTATTN_FN TileKind classify_tile(const MaskGeometry& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const TileRange keys = key_range(g, i0, i1);
  if (j1 <= keys.begin || j0 >= keys.end) return TileKind::kSkip;
  return j0 >= keys.full_begin && j1 <= keys.full_end ? TileKind::kFull : TileKind::kPartial;
}

// Number of (i, j) with keep(i, j); what the benchmark counts as visible, and the scheduler as work.
FASTATTN_FN int64_t visible_pairs(const MaskGeometry& g) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < g.Lq; ++i) pairs += max_i64(0, hi(g, i) - lo(g, i));
  return pairs;
}

}  // namespace fastattn
