// Fused attention, forward: o = softmax(scores) v for a block of query rows, in one pass over the keys.
//
// Lanes are query rows. With S^T = K Q^T and O^T = V^T P^T every product is a scalar broadcast times a vector of rows,
// the softmax's maxima and sums are vertical operations, and neither K nor V is packed in float32. Online softmax after
// Dao et al., "FlashAttention", 2022, algorithm 1; the rescaling of O by exp(m_old - m_new) rides on the addition of
// a block's product. Handles everything in core/params.h but float64.
#pragma once

#include "cpu/additive.h"
#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "cpu/small.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// One worker's memory; `keys` at a time.
struct ForwardScratch {
  float* qt;  // Q^T by panels, times the scale in float arithmetic; additive scores: score_rows
  float* ot;  // O^T by panels, not yet divided by the row sums
  float* s;   // [keys][kPanelRows]: a panel's scores, then weights
  float* k;   // copies of K and V, where they are needed
  float* v;
  float* w;        // additive scores: [padded D]
  float* bias;     // [keys][kBlockRows]
  float* dropout;  // [keys][kBlockRows]
  uint64_t* keep;  // [keys]
  float* row_max;  // [kBlockRows] each
  float* row_sum;
  float* rescale;
};

// O^T is computed in groups of kColumnRows head dims and read back in groups of kLanes.
FASTATTN_FN int64_t ot_columns(const AttentionParams& p) { return round_up(p.Dv, kLanes > 8 ? kLanes : 8); }

template <class Operands>
inline ForwardScratch forward_scratch(const AttentionParams& p, char* memory, size_t* bytes) {
  Arena arena{memory};
  ForwardScratch s;
  s.qt = arena.take<float>(Operands::transposed_columns(p.D) * kBlockRows);
  s.ot = arena.take<float>(ot_columns(p) * kBlockRows);
  s.s = arena.take<float>((kMaxBlockKeys + kRowPad) * kPanelRows);
  s.k = arena.take<float>(Operands::copy_floats(kMaxBlockKeys, p.D));
  s.v = arena.take<float>(Operands::copy_floats(kMaxBlockKeys, p.Dv));
  s.w = arena.take<float>(is_additive<Operands>(p) ? Operands::padded(p.D) : 0);
  s.bias = arena.take<float>(p.bias != nullptr ? kMaxBlockKeys * kBlockRows : 0);
  s.dropout = arena.take<float>(p.dropout_p > 0.0 ? kMaxBlockKeys * kBlockRows : 0);
  s.keep = arena.take<uint64_t>(kMaxBlockKeys);
  s.row_max = arena.take<float>(kBlockRows);
  s.row_sum = arena.take<float>(kBlockRows);
  s.rescale = arena.take<float>(kBlockRows);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// One block of keys for NV vectors of rows: scores, softmax, weighted values.
template <class Operands>
struct ForwardPanel {
  const AttentionParams& p;
  const ForwardScratch& scratch;
  const ScoreModifiers* modifiers;    // null: scores are the products, times `scale`
  float scale;                        // not yet in Q; > 0 where modifiers is null
  const TanhRows<Operands>* queries;  // additive scores; null: dot products
  Operand k, v;
  int64_t first_key, nk;  // of the tile's keys, those to compute; k and v start at first_key
  int64_t v_rows;         // of O^T
  bool is_first;

  template <int NV>
  inline void run(int v0) const {
    using Unit = typename Operands::Unit;
    constexpr int64_t kRow = kPanelRows * 4;
    float* s = scratch.s;
    const char* qt =
        reinterpret_cast<const char*>(scratch.qt + panel_offset(v0 * kLanes, Operands::transposed_columns(p.D)));
    const int64_t units = Operands::units(p.D);
    const Vf minus_infinity = vset(-__builtin_inff());

    Vf lane_max[NV];
    for (int i = 0; i < NV; ++i) lane_max[i] = minus_infinity;
    const int64_t k_rows = max_i64(nk, row_major_rows(NV));
    const bool is_dot = Operands::kPairs || queries == nullptr;
    const bool has_max = is_dot && modifiers == nullptr && nk == k_rows;
    if (has_max) {
      gemm_row_major<Unit, NV, true>(k.data, k.stride_bytes, k_rows, qt, kRow, units, s, kPanelRows, lane_max);
    } else if (is_dot) {
      gemm_row_major<Unit, NV, false>(k.data, k.stride_bytes, k_rows, qt, kRow, units, s, kPanelRows, lane_max);
    } else {
      additive_scores<NV>(*queries, v0, k, scratch.w, nk, s, kPanelRows);
    }
    if (modifiers != nullptr) {
      modify_scores<NV>(*modifiers, s, kPanelRows, first_key, nk, v0, lane_max);
    } else if (!has_max) {
      for (int64_t c = 0; c < nk; ++c) {
        for (int i = 0; i < NV; ++i) lane_max[i] = vmax(lane_max[i], vload(s + c * kPanelRows + i * kLanes));
      }
    }
    const float score_scale = modifiers != nullptr ? 1.0f : scale;

    Vf base[NV], sum[NV];
    for (int i = 0; i < NV; ++i) {
      float* row_max = scratch.row_max + (v0 + i) * kLanes;
      const Vf old_max = is_first ? minus_infinity : vload(row_max);
      const Vf new_max = vmax(old_max, vmul(lane_max[i], vset(score_scale)));
      vstore(row_max, new_max);
      // A row that has seen nothing weighs against 0 instead of -inf, since -inf - -inf is NaN.
      base[i] = vselect(vequal(new_max, minus_infinity), vzero(), new_max);
      vstore(scratch.rescale + (v0 + i) * kLanes, vexp(vsub(old_max, base[i])));
      sum[i] = vzero();
    }

    if (p.dropout_p > 0.0) {
      weights<NV, true>(v0, base, sum, score_scale);
    } else {
      weights<NV, false>(v0, base, sum, score_scale);
    }
    for (int i = 0; i < NV; ++i) {
      float* row_sum = scratch.row_sum + (v0 + i) * kLanes;
      const Vf old_sum = is_first ? vzero() : vload(row_sum);
      vstore(row_sum, vfma(old_sum, vload(scratch.rescale + (v0 + i) * kLanes), sum[i]));
    }

    float* ot = scratch.ot + panel_offset(v0 * kLanes, ot_columns(p));
    const char* pt = reinterpret_cast<const char*>(s);
    const auto all_keys = [&](int64_t, int64_t) { return UnitSpan{0, Operands::units(nk)}; };
    if (is_first) {
      gemm_column_major<Unit, NV, Output::kReplace>(v.data, v.stride_bytes, v_rows, v_rows, pt, kRow, ot, kPanelRows,
                                                    nullptr, all_keys);
    } else {
      gemm_column_major<Unit, NV, Output::kRescaleAndAdd>(v.data, v.stride_bytes, v_rows, v_rows, pt, kRow, ot,
                                                          kPanelRows, scratch.rescale + v0 * kLanes, all_keys);
    }
  }

  // exp(score - base), summed before dropout; in pairs of keys where the unit is a pair, over the scores' memory: pair
  // c / 2 lands on rows that have been read.
  template <int NV, bool kDropout>
  inline void weights(int v0, const Vf (&base)[NV], Vf (&sum)[NV], [[maybe_unused]] float score_scale) const {
    float* s = scratch.s;
    const float* dropout = scratch.dropout + first_key * kBlockRows + v0 * kLanes;
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
      const bool subtract_first = modifiers != nullptr;
      const Vf factor = vset(score_scale * kLog2e), log2e = vset(kLog2e);
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

// Adds the sink, writes o and the row statistics.
template <class Operands>
inline void finish_rows(const AttentionParams& p, const ForwardItem& item, const ForwardScratch& scratch) {
  const int64_t rows = item.i1 - item.i0;
  const float kept = p.dropout_p < 1.0 ? 1.0f : 0.0f;
  float* inverse_sum = scratch.rescale;
  for (int64_t r = 0; r < rows; r += kLanes) {
    Vf m = vload(scratch.row_max + r), l = vload(scratch.row_sum + r);
    // By the sum, which a NaN reaches; a maximum may have lost it to a later score.
    const Vm is_empty = vequal(l, vzero());
    Vf weight = vset(kept);
    if (p.sinks != nullptr) {
      const Vf sink = vset(static_cast<const float*>(p.sinks)[item.hq]);
      const Vf joint = vmax(m, sink);
      const Vf shrink = vexp(vsub(m, joint));
      weight = vmul(weight, shrink);
      l = vselect(is_empty, l, vfma(l, shrink, vexp(vsub(sink, joint))));
      m = vselect(is_empty, m, joint);
    }
    vstore(scratch.row_max + r, m);
    vstore(scratch.row_sum + r, vselect(is_empty, vzero(), l));
    vstore(inverse_sum + r, vselect(is_empty, vzero(), vdiv(weight, l)));
  }
  using Raw = typename Operands::Raw;
  transpose_back<typename Operands::Element>(row_at<Raw>(p.o, p.o_stride, item.b, item.hq, item.i0), p.o_stride[2],
                                             scratch.ot, ot_columns(p), rows, p.Dv, inverse_sum);
  const int64_t first = (item.b * p.Hq + item.hq) * p.Lq + item.i0;
  for (int64_t r = 0; r < rows; ++r) {
    const float m = scratch.row_max[r], l = scratch.row_sum[r];
    if (p.lse != nullptr) static_cast<float*>(p.lse)[first + r] = l == 0.0f ? m : m + __builtin_logf(l);
    if (p.row_max != nullptr) static_cast<float*>(p.row_max)[first + r] = m;
    if (p.row_sum != nullptr) static_cast<float*>(p.row_sum)[first + r] = l;
  }
}

inline void clear_rows(const AttentionParams& p, const ForwardScratch& scratch) {
  for (int64_t r = 0; r < kBlockRows; ++r) {
    scratch.row_max[r] = -__builtin_inff();
    scratch.row_sum[r] = 0.0f;
  }
  memset(scratch.ot, 0, sizeof(float) * static_cast<size_t>(ot_columns(p) * kBlockRows));
}

// A tile that the mask geometry cuts: each vector of rows takes only the keys that one of its rows sees, which leaves
// half a tile of a diagonal to do instead of a whole one.
template <class Operands>
inline void run_trimmed(const MaskGeometry& g, const Tile& tile, const ForwardPanel<Operands>& panel) {
  ForwardPanel<Operands> part = panel;
  part.is_first = false;
  for (int64_t r = 0; r < tile.rows; r += kLanes) {
    const TileSpan span = visible_keys(g, tile, r, min_i64(kLanes, tile.rows - r), kRowPad);
    if (span.begin >= span.end) continue;
    part.first_key = span.begin;
    part.nk = span.end - span.begin;
    part.k.data = panel.k.data + span.begin * panel.k.stride_bytes;
    part.v.data = panel.v.data + (Operands::kPairs ? span.begin / 2 : span.begin) * panel.v.stride_bytes;
    part.template run<1>(static_cast<int>(r / kLanes));
  }
}

template <class Operands>
inline void forward_item_as(const AttentionParams& p, const ForwardItem& item, char* memory) {
  using Raw = typename Operands::Raw;
  const ForwardScratch scratch = forward_scratch<Operands>(p, memory, nullptr);
  if (is_small_forward(p)) return small_forward<typename Operands::Element>(p, item.b, item.hq, scratch.ot);
  const MaskGeometry g = mask_geometry(p, item.b);
  const int64_t hkv = item.hq / (p.Hq / p.Hkv);
  const int64_t rows = item.i1 - item.i0;
  const int vectors = static_cast<int>((rows + kLanes - 1) / kLanes);

  const Raw* q = row_at<const Raw>(p.q, p.q_stride, item.b, item.hq, item.i0);
  // Float arithmetic folds the scale into Q; bfloat16 operands stay what they are.
  const float scale = product_scale(p);
  const float rest_scale = Operands::kPairs ? scale : 1.0f;
  TanhRows<Operands> queries;
  if (is_additive<Operands>(p)) {
    load_w<Operands>(p, item.hq, scratch.w);
    queries = score_rows<Operands>(q, p.q_stride[2], rows, p.D, scratch.qt);
  } else {
    Operands::transposed(scratch.qt, q, p.q_stride[2], rows, p.D, scale);
  }
  const bool always_modify = has_modifiers(p) || rest_scale <= 0.0f;

  KeyBlocks blocks(p, key_range(g, item.i0, item.i1));
  bool is_first = true;  // O^T and the row statistics hold nothing yet
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
    if (p.dropout_p > 0.0) fill_dropout_tile(p, tile, scratch.dropout);
    const Raw* k = row_at<const Raw>(p.k, p.k_stride, item.b, hkv, tile.j0);
    Operand keys;
    if (is_additive<Operands>(p)) {
      TanhRows<Operands> additive_keys = key_rows<Operands>(k, p.k_stride[2], tile.nk, p.D, scratch.k);
      take_common_form(queries, additive_keys);
      keys = additive_keys.operand();
    } else {
      keys = Operands::broadcast_rows(scratch.k, k, p.k_stride[2], tile.nk, p.D);
    }
    const ForwardPanel<Operands> panel{
        p,
        scratch,
        is_modified ? &modifiers : nullptr,
        rest_scale,
        is_additive<Operands>(p) ? &queries : nullptr,
        keys,
        Operands::broadcast_columns(scratch.v, row_at<const Raw>(p.v, p.v_stride, item.b, hkv, tile.j0), p.v_stride[2],
                                    tile.nk, p.Dv),
        0,
        tile.nk,
        round_up(p.Dv, kColumnRows),
        is_first};
    if (kind == TileKind::kPartial && p.mask == nullptr) {
      if (is_first) clear_rows(p, scratch);
      run_trimmed(g, tile, panel);
    } else {
      for_each_panel(vectors, panel);
    }
    is_first = false;
  }
  if (is_first) clear_rows(p, scratch);
  finish_rows<Operands>(p, item, scratch);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
