// The scores of a block of query rows, tile by tile: the one walk over the keys that all forward computations share.
//
// Lanes are query rows. For each block of keys that the rows see, the walk settles what masks hide of it, computes
// S^T = K Q^T (a scalar broadcast times a vector of rows; or additive scores) for a panel of rows at a time, applies
// the modifiers, and takes the rows' maxima on the way. A consumer then has the panel while it is in the cache:
//
//   forward.h    WeightedSum         softmax(S) V
//   hard.h       Draw                one key for each row
//   summary.h    Summarise, KeyMass  entropy and largest weights of each row; sums over rows
//
// A consumer has
//
//   static constexpr bool kServesAdditive
//   void begin_tile(const Tile&)                            once for a tile, before its panels
//   template <int NV> void take(const PanelScores<NV>&)     NV vectors of rows
//   void clear()                                            every row as it is before the first key
//
// Tiles come in the order of their keys, and each panel's keys within it, so that of equal scores the lower key comes
// first.
#pragma once

#include "cpu/additive.h"
#include "cpu/cached_rows.h"
#include "cpu/gemm.h"
#include "cpu/head_copy.h"
#include "cpu/operands.h"
#include "cpu/row_statistics.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// One worker's memory for the walk; `keys` at a time.
struct ScoreScratch {
  float* qt;       // Q^T by panels, times the scale in float arithmetic; additive scores: score_rows
  float* s;        // [keys][kPanelRows]: a panel's scores
  float* k;        // a copy of K, where it is needed
  void* k_cached;  // rows of K out of pages or int8 numbers
  float* w;        // additive scores: [padded D]
  float* bias;     // [keys][kBlockRows]
  uint64_t* keep;  // [keys]
};

template <class Operands>
inline ScoreScratch score_scratch(const AttentionParams& p, Arena* arena) {
  ScoreScratch s;
  s.qt = arena->take<float>(Operands::transposed_columns(p.D) * kBlockRows);
  s.s = arena->take<float>((kMaxBlockKeys + kRowPad) * kPanelRows);
  s.k = arena->take<float>(Operands::copy_floats(kMaxBlockKeys, p.D));
  s.k_cached = arena->take<typename Operands::Raw>(cached_copy(p, kMaxBlockKeys, p.D));
  s.w = arena->take<float>(is_additive<Operands>(p) ? Operands::padded(p.D) : 0);
  s.bias = arena->take<float>(p.bias != nullptr ? kMaxBlockKeys * kBlockRows : 0);
  s.keep = arena->take<uint64_t>(kMaxBlockKeys);
  return s;
}

// What a consumer takes: the scores of nk keys, from first_key of the tile on, for NV vectors of rows from v0 on.
template <int NV>
struct PanelScores {
  float* s;  // [nk][kPanelRows]; the consumer's to overwrite
  int64_t first_key, nk;
  int v0;
  bool are_modified;         // false: plain products, of ordinary size,
  float scale;               // still to be multiplied by this, which is positive; 1 where they are modified
  bool is_first;             // the rows hold nothing yet: start them instead of adding to them
  const Vf (&lane_max)[NV];  // before `scale`
};

// Scores of one block of keys for NV vectors of rows.
template <class Operands, class Consumer>
struct ScorePanel {
  const AttentionParams& p;
  const ScoreScratch& scratch;
  Consumer& consumer;
  const ScoreModifiers* modifiers;    // null: scores are the products, times `scale`
  float scale;                        // not yet in Q; > 0 where modifiers is null
  const TanhRows<Operands>* queries;  // additive scores; null: dot products
  Operand k;
  int64_t first_key, nk;  // of the tile's keys, those to compute; k starts at first_key
  bool is_first;

  template <int NV>
  inline void run(int v0) const {
    using Unit = typename Operands::Unit;
    constexpr int64_t kRow = kPanelRows * 4;
    float* s = scratch.s;
    const char* qt =
        reinterpret_cast<const char*>(scratch.qt + panel_offset(v0 * kLanes, Operands::transposed_columns(p.D)));
    const int64_t units = Operands::units(p.D);

    Vf lane_max[NV];
    for (int i = 0; i < NV; ++i) lane_max[i] = vset(-__builtin_inff());
    const int64_t k_rows = max_i64(nk, row_major_rows(NV));
    constexpr bool kMayBeAdditive = Consumer::kServesAdditive && !Operands::kPairs;
    const bool is_dot = !kMayBeAdditive || queries == nullptr;
    const bool has_max = is_dot && modifiers == nullptr && nk == k_rows;
    if (has_max) {
      gemm_row_major<Unit, NV, true>(k.data, k.stride_bytes, k_rows, qt, kRow, units, s, kPanelRows, lane_max);
    } else if (is_dot) {
      gemm_row_major<Unit, NV, false>(k.data, k.stride_bytes, k_rows, qt, kRow, units, s, kPanelRows, lane_max);
    } else if constexpr (kMayBeAdditive) {
      additive_scores<NV>(*queries, v0, k, scratch.w, nk, s, kPanelRows);
    }
    if (modifiers != nullptr) {
      modify_scores<NV>(*modifiers, s, kPanelRows, first_key, nk, v0, lane_max);
    } else if (!has_max) {
      for (int64_t c = 0; c < nk; ++c) {
        for (int i = 0; i < NV; ++i) lane_max[i] = vmax(lane_max[i], vload(s + c * kPanelRows + i * kLanes));
      }
    }
    const bool are_modified = modifiers != nullptr;
    consumer.take(PanelScores<NV>{s, first_key, nk, v0, are_modified, are_modified ? 1.0f : scale, is_first, lane_max});
  }
};

// A tile that the mask geometry cuts: each vector of rows takes only the keys that one of its rows sees, which leaves
// half a tile of a diagonal to do instead of a whole one.
template <class Operands, class Consumer>
inline void run_trimmed(const MaskGeometry& g, const Tile& tile, const ScorePanel<Operands, Consumer>& panel) {
  ScorePanel<Operands, Consumer> part = panel;
  part.is_first = false;
  for (int64_t r = 0; r < tile.rows; r += kLanes) {
    const TileSpan span = visible_keys(g, tile, r, min_i64(kLanes, tile.rows - r), kRowPad);
    if (span.begin >= span.end) continue;
    part.first_key = span.begin;
    part.nk = span.end - span.begin;
    part.k.data = panel.k.data + span.begin * panel.k.stride_bytes;
    part.template run<1>(static_cast<int>(r / kLanes));
  }
}

// The part of a range of keys that lies in [j0, j1).
FASTATTN_FN TileRange clipped(const TileRange& range, int64_t j0, int64_t j1) {
  const int64_t begin = max_i64(range.begin, j0);
  return {begin, max_i64(begin, min_i64(range.end, j1)), max_i64(range.full_begin, j0), min_i64(range.full_end, j1)};
}

// Takes the consumer over the keys [j0, j1) that the item's rows see. `head`, if not null, is asked for each tile.
template <class Operands, class Consumer>
inline void walk_scores(const AttentionParams& p, const ForwardItem& item, int64_t j0, int64_t j1,
                        const ScoreScratch& scratch, Consumer& consumer, HeadCopy<Operands>* head = nullptr) {
  using Raw = typename Operands::Raw;
  const MaskGeometry g = mask_geometry(p, item.b);
  const TileRange seen = clipped(key_range(g, item.i0, item.i1), j0, j1);
  if (seen.begin >= seen.end) return consumer.clear();
  const int64_t hkv = item.hq / (p.Hq / p.Hkv);
  const int64_t rows = item.i1 - item.i0;
  const int vectors = static_cast<int>((rows + kLanes - 1) / kLanes);

  const Raw* q = row_at<const Raw>(p.q, p.q_stride, item.b, item.hq, item.i0);
  // Float arithmetic folds the scale into Q; bfloat16 operands stay what they are.
  const float scale = product_scale(p);
  const float rest_scale = Operands::kPairs ? scale : 1.0f;
  TanhRows<Operands> queries;
  const bool has_tanh = Consumer::kServesAdditive && is_additive<Operands>(p);
  if (has_tanh) {
    load_w<Operands>(p, item.hq, scratch.w);
    queries = score_rows<Operands>(q, p.q_stride[2], rows, p.D, scratch.qt);
  } else {
    Operands::transposed(scratch.qt, q, p.q_stride[2], rows, p.D, scale);
  }
  const bool always_modify = has_modifiers(p) || rest_scale <= 0.0f;

  KeyBlocks blocks(p, seen);
  bool is_first = true;
  for (int64_t begin, end; blocks.next(&begin, &end);) {
    const Tile tile{item.b, item.hq, item.i0, rows, begin, end - begin};
    const TileKind kind = tile_mask(p, g, tile, scratch.keep);
    if (kind == TileKind::kSkip) continue;
    ScoreModifiers modifiers;
    const bool is_modified = always_modify || kind == TileKind::kPartial;
    if (is_modified) {
      modifiers =
          score_modifiers(p, g, tile, rest_scale, kind == TileKind::kPartial ? scratch.keep : nullptr, scratch.bias);
    }
    Operand keys;
    if (head != nullptr && head->take(tile)) {
      keys = head->keys(tile);
    } else {
      const CachedRows<Raw> k = cached_rows<typename Operands::Element>(p, cached_keys(p), item.b, hkv, tile.j0,
                                                                        tile.nk, static_cast<Raw*>(scratch.k_cached));
      if (has_tanh) {
        TanhRows<Operands> additive_keys = key_rows<Operands>(k.data, k.stride, tile.nk, p.D, scratch.k);
        take_common_form(queries, additive_keys);
        keys = additive_keys.operand();
      } else {
        keys = Operands::broadcast_rows(scratch.k, k.data, k.stride, tile.nk, p.D);
      }
    }
    consumer.begin_tile(tile);
    const ScorePanel<Operands, Consumer> panel{
        p, scratch, consumer, is_modified ? &modifiers : nullptr, rest_scale, has_tanh ? &queries : nullptr, keys,
        0, tile.nk, is_first};
    if (kind == TileKind::kPartial && p.mask == nullptr) {
      if (is_first) consumer.clear();
      run_trimmed(g, tile, panel);
    } else {
      for_each_panel(vectors, panel);
    }
    is_first = false;
  }
  if (is_first) consumer.clear();
}

// The online softmax of a block of rows, [kBlockRows] each.
struct RowScratch {
  float* row_max;
  float* row_sum;
  float* rescale;  // exp(old maximum - new maximum) while the walk lasts, then by what a row's weights are multiplied
};

inline RowScratch row_scratch(Arena* arena) {
  RowScratch s;
  s.row_max = arena->take<float>(kBlockRows);
  s.row_sum = arena->take<float>(kBlockRows);
  s.rescale = arena->take<float>(kBlockRows);
  return s;
}

inline void clear_rows(const RowScratch& rows) {
  for (int64_t r = 0; r < kBlockRows; ++r) {
    rows.row_max[r] = -__builtin_inff();
    rows.row_sum[r] = 0.0f;
  }
}

// Raises the rows' maxima to those of a panel. What the rows hold must then be multiplied by `rescale`, which
// exp(`moved`) is; new weights are exp(score - base).
template <int NV>
FASTATTN_FN void raise_row_max(const RowScratch& rows, const PanelScores<NV>& panel, Vf (&base)[NV], Vf (&moved)[NV]) {
  const Vf minus_infinity = vset(-__builtin_inff());
  for (int i = 0; i < NV; ++i) {
    float* row_max = rows.row_max + (panel.v0 + i) * kLanes;
    const Vf old_max = panel.is_first ? minus_infinity : vload(row_max);
    const Vf new_max = vmax(old_max, vmul(panel.lane_max[i], vset(panel.scale)));
    vstore(row_max, new_max);
    // A row that has seen nothing weighs against 0 instead of -inf, since -inf - -inf is NaN.
    base[i] = vselect(vequal(new_max, minus_infinity), vzero(), new_max);
    moved[i] = vsub(old_max, base[i]);
    vstore(rows.rescale + (panel.v0 + i) * kLanes, vexp(moved[i]));
  }
}

template <int NV>
FASTATTN_FN void add_row_sum(const RowScratch& rows, const PanelScores<NV>& panel, const Vf (&sum)[NV]) {
  for (int i = 0; i < NV; ++i) {
    float* row_sum = rows.row_sum + (panel.v0 + i) * kLanes;
    const Vf old_sum = panel.is_first ? vzero() : vload(row_sum);
    vstore(row_sum, vfma(old_sum, vload(rows.rescale + (panel.v0 + i) * kLanes), sum[i]));
  }
}

// After the last key, for a vector of rows from r on: the sink, if not null, joins the rows that see a key, and
// `rescale` becomes factor * exp(maximum of the keys - row_max) / row_sum, 0 for the others.
FASTATTN_FN void close_rows(const RowScratch& rows, int64_t r, float factor, const Vf* sink) {
  Vf m = vload(rows.row_max + r), l = vload(rows.row_sum + r);
  // By the sum, which a NaN reaches; a maximum may have lost it to a later score.
  const Vm is_empty = vequal(l, vzero());
  Vf weight = vset(factor);
  if (sink != nullptr) {
    const Vf joint = vmax(m, *sink);
    const Vf shrink = vexp(vsub(m, joint));
    weight = vmul(weight, shrink);
    l = vselect(is_empty, l, vfma(l, shrink, vexp(vsub(*sink, joint))));
    m = vselect(is_empty, m, joint);
  }
  vstore(rows.row_max + r, m);
  vstore(rows.row_sum + r, vselect(is_empty, vzero(), l));
  vstore(rows.rescale + r, vselect(is_empty, vzero(), vdiv(weight, l)));
}

inline void finish_rows(const AttentionParams& p, const ForwardItem& item, float factor, const RowScratch& rows) {
  const Vf sink = vset(p.sinks != nullptr ? static_cast<const float*>(p.sinks)[item.hq] : 0.0f);
  for (int64_t r = 0; r < item.i1 - item.i0; r += kLanes) {
    close_rows(rows, r, factor, p.sinks != nullptr ? &sink : nullptr);
  }
}

// Writes the row statistics that are asked for.
inline void write_statistics(const AttentionParams& p, const ForwardItem& item, const RowScratch& rows) {
  for (int64_t r = 0; r < item.i1 - item.i0; ++r) {
    write_row_statistics(p, item.b, item.hq, item.i0 + r, rows.row_max[r], rows.row_sum[r]);
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
