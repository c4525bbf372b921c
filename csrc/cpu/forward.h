// Fused attention, forward: o = softmax(scores) v for a block of query rows, in one pass over the keys.
//
// O^T = V^T P^T has lanes = query rows, as the scores have (scores.h): the softmax's maxima and sums are vertical
// operations, and neither K nor V need be packed in float32. Online softmax after Dao et al., "FlashAttention", 2022,
// algorithm 1; the rescaling of O by exp(m_old - m_new) rides on the addition of a block's product. Handles everything
// in core/params.h but float64.
#pragma once

#include "cpu/scores.h"
#include "cpu/small.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// One worker's memory; `keys` at a time.
struct ForwardScratch {
  ScoreScratch scores;
  RowScratch rows;
  float* ot;       // O^T by panels, not yet divided by the row sums
  float* v;        // a copy of V, where it is needed
  void* v_cached;  // rows of V out of pages or int8 numbers
  float* dropout;  // [keys][kBlockRows]
};

// O^T is computed in groups of kColumnRows head dims and read back in groups of kLanes.
FASTATTN_FN int64_t ot_columns(const AttentionParams& p) { return round_up(p.Dv, kLanes > 8 ? kLanes : 8); }

template <class Operands>
inline ForwardScratch forward_scratch(const AttentionParams& p, char* memory, size_t* bytes) {
  Arena arena{memory};
  ForwardScratch s;
  s.scores = score_scratch<Operands>(p, &arena);
  s.rows = row_scratch(&arena);
  s.ot = arena.take<float>(ot_columns(p) * kBlockRows);
  s.v = arena.take<float>(Operands::copy_floats(kMaxBlockKeys, p.Dv));
  s.v_cached = arena.take<typename Operands::Raw>(cached_copy(p, kMaxBlockKeys, p.Dv));
  s.dropout = arena.take<float>(p.dropout_p > 0.0 ? kMaxBlockKeys * kBlockRows : 0);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// Consumer of scores: weights, their sums, and the sums of values by weight.
template <class Operands>
struct WeightedSum {
  static constexpr bool kServesAdditive = true;
  const AttentionParams& p;
  const ForwardScratch& scratch;
  const HeadCopy<Operands>& head;
  Operand v{};  // of the tile

  inline void begin_tile(const Tile& tile) {
    using Raw = typename Operands::Raw;
    if (p.dropout_p > 0.0) fill_dropout_tile(p, tile, scratch.dropout);
    if (head.holds_tile()) {
      v = head.values(tile);
      return;
    }
    const int64_t hkv = tile.hq / (p.Hq / p.Hkv);
    const CachedRows<Raw> rows = cached_rows<typename Operands::Element>(p, cached_values(p), tile.b, hkv, tile.j0,
                                                                         tile.nk, static_cast<Raw*>(scratch.v_cached));
    v = Operands::broadcast_columns(scratch.v, rows.data, rows.stride, tile.nk, p.Dv);
  }

  inline void clear() const {
    clear_rows(scratch.rows);
    memset(scratch.ot, 0, sizeof(float) * static_cast<size_t>(ot_columns(p) * kBlockRows));
  }

  template <int NV>
  inline void take(const PanelScores<NV>& panel) const {
    using Unit = typename Operands::Unit;
    constexpr int64_t kRow = kPanelRows * 4;
    Vf base[NV], moved[NV], sum[NV];
    raise_row_max(scratch.rows, panel, base, moved);
    for (int i = 0; i < NV; ++i) sum[i] = vzero();
    if (p.dropout_p > 0.0) {
      weights<NV, true>(panel, base, sum);
    } else {
      weights<NV, false>(panel, base, sum);
    }
    add_row_sum(scratch.rows, panel, sum);

    float* ot = scratch.ot + panel_offset(panel.v0 * kLanes, ot_columns(p));
    const char* pt = reinterpret_cast<const char*>(panel.s);
    const char* values = v.data + (Operands::kPairs ? panel.first_key / 2 : panel.first_key) * v.stride_bytes;
    const int64_t v_rows = round_up(p.Dv, kColumnRows);
    const auto all_keys = [&](int64_t, int64_t) { return UnitSpan{0, Operands::units(panel.nk)}; };
    if (panel.is_first) {
      gemm_column_major<Unit, NV, Output::kReplace>(values, v.stride_bytes, v_rows, v_rows, pt, kRow, ot, kPanelRows,
                                                    nullptr, all_keys);
    } else {
      gemm_column_major<Unit, NV, Output::kRescaleAndAdd>(values, v.stride_bytes, v_rows, v_rows, pt, kRow, ot,
                                                          kPanelRows, scratch.rows.rescale + panel.v0 * kLanes,
                                                          all_keys);
    }
  }

  // exp(score - base), summed before dropout; in pairs of keys where the unit is a pair, over the scores' memory: pair
  // c / 2 lands on rows that have been read.
  template <int NV, bool kDropout>
  inline void weights(const PanelScores<NV>& panel, const Vf (&base)[NV], Vf (&sum)[NV]) const {
    float* s = panel.s;
    const int64_t nk = panel.nk;
    const float* dropout = scratch.dropout + panel.first_key * kBlockRows + panel.v0 * kLanes;
    if constexpr (!Operands::kPairs) {
      for (int64_t c = 0; c < nk; ++c) {
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) {
          float* at = s + c * kPanelRows + i * kLanes;
          Vf w = vexp(vsub(vload(at), base[i]));
          sum[i] = vadd(sum[i], w);
          if constexpr (kDropout) w = vmul(w, vload(dropout + c * kBlockRows + i * kLanes));
          vstore(at, w);
        }
      }
    }
#if FASTATTN_BF16_DOT
    else {
      // Modified scores may be large and equal (a finite mask): subtract first. Plain products may be scaled and
      // shifted in one operation, at an error far below bfloat16's.
      const bool subtract_first = panel.are_modified;
      const Vf factor = vset(panel.scale * kLog2e), log2e = vset(kLog2e);
      Vf shift[NV];
      for (int i = 0; i < NV; ++i) shift[i] = vmul(base[i], vset(-kLog2e));
      for (int64_t c = 0; c < nk; c += 2) {
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) {
          float* at = s + c * kPanelRows + i * kLanes;
          Vf w[2];
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            if (c + h >= nk) {
              w[h] = vzero();
              continue;
            }
            const Vf x = vload(at + h * kPanelRows);
            const Vf t = subtract_first ? vmul(vsub(x, base[i]), log2e) : vfma(x, factor, shift[i]);
            w[h] = vexp2<Operands::kExp2Degree>(t);
            sum[i] = vadd(sum[i], w[h]);
            if constexpr (kDropout) w[h] = vmul(w[h], vload(dropout + (c + h) * kBlockRows + i * kLanes));
          }
          vistore(reinterpret_cast<uint32_t*>(s + c / 2 * kPanelRows + i * kLanes),
                  vinterleave_halves(vnarrow(w[0], w[1])));
        }
      }
    }
#endif
  }
};

// Leaves what a part of the keys made of the rows.
inline void write_partial(const AttentionParams& p, const ForwardItem& item, const ForwardScratch& scratch) {
  const int64_t rows = item.i1 - item.i0;
  float* to = partial_row(p, item.partial, item.hq, item.i0);
  for (int64_t r = 0; r < rows; r += kLanes) vstore(scratch.rows.rescale + r, vset(1.0f));
  transpose_back<Float32>(to, partial_row_floats(p), scratch.ot, ot_columns(p), rows, p.Dv, scratch.rows.rescale);
  for (int64_t r = 0; r < rows; ++r) {
    float* state = partial_state(p, to + r * partial_row_floats(p));
    state[0] = scratch.rows.row_max[r];
    state[1] = scratch.rows.row_sum[r];
  }
}

template <class Operands>
inline void forward_item_as(const AttentionParams& p, const ForwardItem& item, char* memory) {
  using Raw = typename Operands::Raw;
  const ForwardScratch scratch = forward_scratch<Operands>(p, memory, nullptr);
  if (item.partial == nullptr && is_small_forward(p))
    return small_forward<typename Operands::Element>(p, item.b, item.hq, scratch.ot);
  HeadCopy<Operands> head(p, item, scratch.scores.k_cached, scratch.v_cached);
  WeightedSum<Operands> consumer{p, scratch, head};
  walk_scores<Operands>(p, item, item.j0, min_i64(item.j1, p.Lk), scratch.scores, consumer, &head);
  if (item.partial != nullptr) return write_partial(p, item, scratch);
  finish_rows(p, item, p.dropout_p < 1.0 ? 1.0f : 0.0f, scratch.rows);
  transpose_back<typename Operands::Element>(row_at<Raw>(p.o, p.o_stride, item.b, item.hq, item.i0), p.o_stride[2],
                                             scratch.ot, ot_columns(p), item.i1 - item.i0, p.Dv, scratch.rows.rescale);
  write_statistics(p, item, scratch.rows);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
