// Fused attention, backward: dq, dk, dv, and the gradients of bias and sinks, from o, row_max and row_sum of the
// forward.
//
//   P  = exp(S - row_max) / row_sum          dV += (P * Z)^T dO          Z = dropout: 0 or 1 / (1 - p)
//   dP = dO V^T * Z                          dS  = P * (dP - delta)      delta_i = dO_i . O_i - d_lse_i
//   d_bias += dS                             dQ += scale * dS' K         dS' = dS * d softcap
//   d_sinks_h = -sum_i exp(sink_h - row_max_i) / row_sum_i * delta_i     dK += scale * dS'^T Q
//
// and what additive scores have in place of the last two products: additive.h. Of hard attention, instead (Williams,
// "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992):
//
//   dS = d_log_prob * ((j == index) - P)        dV = the sum of dO over the rows that took a key
//
// (Dao et al., "FlashAttention", 2022, algorithm 4, and appendix B for delta.) Scores are computed again as in the
// forward pass, transposed, with lanes = query rows, and from them dS' (score_gradients.h); in the three products that
// follow, lanes = head dims and the caller's rows are operands as they lie. A task owns a chunk of keys; it walks over
// blocks of kSuperRows query rows, whose packed operands fit the second-level cache, and for each over its blocks of
// keys. Five matrix products, no atomics; every sum has one order, fixed by the shape.
#pragma once

#include "cpu/additive.h"
#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "cpu/score_gradients.h"
#include "cpu/small.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Which part of a contraction over the tile's rows (or keys) a group of keys (or rows) needs: all of it, or, where the
// mask geometry cuts the tile, what is visible.
template <class Operands, bool kOverRows>
struct TileUnits {
  const MaskGeometry* g;  // null: all of it
  const Tile* tile;
  FASTATTN_FN UnitSpan of(const TileUnits& self, int64_t first, int64_t count) {
    const Tile& t = *self.tile;
    if (self.g == nullptr) return {0, Operands::units(kOverRows ? t.rows : t.nk)};
    const TileSpan span =
        kOverRows ? visible_rows(*self.g, t, first, count) : visible_keys(*self.g, t, first, count, 0);
    return {Operands::kPairs ? span.begin / 2 : span.begin, Operands::units(span.end)};
  }
  FASTATTN_INLINE UnitSpan operator()(int64_t first, int64_t count) const { return of(*this, first, count); }
};

// dV += P^T dO or dK += dS^T Q: lanes = head dims, A row-major, contraction over the tile's rows.
template <class Operands>
struct AccumulateKeys {
  const char* a;
  int64_t a_stride, keys;
  Operand b;
  float* c;
  int64_t c_stride;
  TileUnits<Operands, true> span;
  template <int NV>
  inline void run(int v0) const {
    gemm_row_major_accumulate<typename Operands::Unit, NV>(a, a_stride, keys, b.data + v0 * kLanes * 4, b.stride_bytes,
                                                           c + v0 * kLanes, c_stride, span);
  }
};

// dQ += dS K: lanes = head dims, A column-major, contraction over the tile's keys.
template <class Operands>
struct AccumulateRows {
  const char* a;
  int64_t a_stride, rows;
  Operand b;
  float* c;
  int64_t c_stride;
  TileUnits<Operands, false> span;
  template <int NV>
  inline void run(int v0) const {
    gemm_column_major<typename Operands::Unit, NV, Output::kAdd>(a, a_stride, rows, round_up(rows, kColumnRows),
                                                                 b.data + v0 * kLanes * 4, b.stride_bytes,
                                                                 c + v0 * kLanes, c_stride, nullptr, span);
  }
};

FASTATTN_FN int vectors_of(int64_t n) { return static_cast<int>((n + kLanes - 1) / kLanes); }

// Adds the tile's dS, [key][row], to the bias gradient: over keys or rows where the bias broadcasts them.
inline void add_d_bias(const AttentionGradParams& gp, const Tile& t, const float* tile) {
  const int64_t* stride = gp.d_bias_stride;
  float* to = static_cast<float*>(gp.d_bias) + t.b * stride[0] + t.hq * stride[1] + t.i0 * stride[2] + t.j0 * stride[3];
  if (stride[2] == 0) {
    for (int64_t c = 0; c < t.nk; ++c) {
      Vf sum = vzero();
      for (int64_t r = 0; r < t.rows; r += kLanes) {
        const Vf x = vload(tile + c * kBlockRows + r);
        // Lanes past the last row hold the weights of rows that do not exist.
        sum = vadd(sum, r + kLanes <= t.rows ? x : vload_first(tile + c * kBlockRows + r, t.rows - r));
      }
      to[c * stride[3]] += vreduce_add(sum);
    }
    return;
  }
  for (int64_t r0 = 0; r0 < t.rows; r0 += kLanes) {
    if (stride[3] == 0) {
      Vf sum = vzero();
      for (int64_t c = 0; c < t.nk; ++c) sum = vadd(sum, vload(tile + c * kBlockRows + r0));
      float lanes[kLanes];
      vstore(lanes, sum);
      for (int64_t r = 0; r < kLanes && r0 + r < t.rows; ++r) to[(r0 + r) * stride[2]] += lanes[r];
      continue;
    }
    for (int64_t c0 = 0; c0 < t.nk; c0 += kLanes) {
      Vf block[kLanes];
      for (int c = 0; c < kLanes; ++c) block[c] = c0 + c < t.nk ? vload(tile + (c0 + c) * kBlockRows + r0) : vzero();
      vtranspose(block);
      for (int r = 0; r < kLanes && r0 + r < t.rows; ++r) {
        float* row = to + (r0 + r) * stride[2] + c0;  // a gradient's own keys are contiguous
        const int64_t n = min_i64(kLanes, t.nk - c0);
        Float32::store_first(row, vadd(Float32::load_first(row, n), block[r]), n);
      }
    }
  }
}

// dV of hard attention for the keys [j0, j1) of a key head: adds dO of each row to the key that it took, in the order
// of the rows. dv: [keys][dv_stride], cleared.
template <class Operands>
inline void scatter_d_o(const HardAttentionGradParams& hp, int64_t b, int64_t hkv, int64_t j0, int64_t j1, float* dv,
                        int64_t dv_stride) {
  using Element = typename Operands::Element;
  const AttentionParams& p = hp.forward;
  const int64_t group = p.Hq / p.Hkv;
  for (int64_t hq = hkv * group; hq < (hkv + 1) * group; ++hq) {
    const int64_t* index = hp.index + (b * p.Hq + hq) * p.Lq;
    for (int64_t i = 0; i < p.Lq; ++i) {
      if (index[i] < j0 || index[i] >= j1) continue;
      const auto* d_o = row_at<const typename Operands::Raw>(hp.d_o, hp.d_o_stride, b, hq, i);
      float* to = dv + (index[i] - j0) * dv_stride;
      for (int64_t d = 0; d < p.Dv; d += kLanes)
        vstore(to + d, vadd(vload(to + d), Element::load_first(d_o + d, p.Dv - d)));
    }
  }
}

// A super-block of rows of one head against the task's keys [j0, j1), which all exist.
template <class Operands>
inline void backward_super_block(const AttentionGradParams& gp, const MaskGeometry& g, int64_t b, int64_t hq,
                                 int64_t hkv, int64_t super_i0, int64_t super_i1, int64_t j0, int64_t j1, bool is_hard,
                                 float* dq, const BackwardScratch& scratch) {
  using Raw = typename Operands::Raw;
  const AttentionParams& p = gp.forward;
  const float scale = product_scale(p);
  const float rest_scale = Operands::kPairs ? scale : 1.0f;
  const int64_t step = key_step(p, j1 - j0);

  // Pack the blocks of rows that see any of these keys.
  const TileRange seen = row_range(g, j0, j1);
  Operand q_rows[kSuperBlocks], d_o_rows[kSuperBlocks];
  TanhRows<Operands> queries[kSuperBlocks];
  for (int64_t i0 = super_i0; i0 < super_i1; i0 += kBlockRows) {
    const int64_t block = (i0 - super_i0) / kBlockRows;
    const int64_t rows = min_i64(kBlockRows, super_i1 - i0);
    if (i0 >= seen.end || i0 + rows <= seen.begin) continue;
    const Raw* q = row_at<const Raw>(p.q, p.q_stride, b, hq, i0);
    if (is_additive<Operands>(p)) {
      queries[block] = {
          q, p.q_stride[2], rows, p.D, rows > kFewRows ? scratch.qt[block] : nullptr, scratch.q_rows[block]};
      queries[block].load();
    } else {
      Operands::transposed(scratch.qt[block], q, p.q_stride[2], rows, p.D, scale);
      q_rows[block] = Operands::vector_rows(scratch.q_rows[block], q, p.q_stride[2], rows, p.D);
    }
    if (is_hard) continue;
    const Raw* d_o = row_at<const Raw>(gp.d_o, gp.d_o_stride, b, hq, i0);
    Operands::transposed(scratch.d_ot[block], d_o, gp.d_o_stride[2], rows, p.Dv, 1.0f);
    clear_saturated_rows<Operands>(scratch.d_ot[block], scratch.is_saturated + block * kBlockRows, rows, p.Dv);
    d_o_rows[block] = Operands::vector_rows(scratch.d_o_rows[block], d_o, gp.d_o_stride[2], rows, p.Dv);
  }

  const int64_t dk_stride = Operands::padded(p.D), dv_stride = Operands::padded(p.Dv);
  for (int64_t key0 = j0; key0 < j1; key0 += step) {
    const int64_t nk = min_i64(step, j1 - key0);
    const TileRange rows_seen = row_range(g, key0, key0 + nk);
    const int64_t begin = max_i64(super_i0, rows_seen.begin / kBlockRows * kBlockRows);
    const int64_t end = min_i64(super_i1, rows_seen.end);
    if (begin >= end) continue;
    const Raw* k = row_at<const Raw>(p.k, p.k_stride, b, hkv, key0);
    Operand k_broadcast{}, k_vectors{}, v_broadcast{};
    TanhRows<Operands> additive_keys;
    if (is_additive<Operands>(p)) {
      additive_keys = key_rows<Operands>(k, p.k_stride[2], nk, p.D, scratch.k);
      k_broadcast = additive_keys.operand();
    } else {
      k_broadcast = Operands::broadcast_rows(scratch.k, k, p.k_stride[2], nk, p.D);
      k_vectors = Operands::vector_rows(scratch.k_rows, k, p.k_stride[2], nk, p.D);
    }
    if (!is_hard) {
      const Raw* v = row_at<const Raw>(p.v, p.v_stride, b, hkv, key0);
      v_broadcast = Operands::broadcast_rows(scratch.v, v, p.v_stride[2], nk, p.Dv);
    }
    for (int64_t i0 = begin; i0 < end; i0 += kBlockRows) {
      const int64_t block = (i0 - super_i0) / kBlockRows;
      const Tile tile{b, hq, i0, min_i64(kBlockRows, super_i1 - i0), key0, nk};
      const TileKind kind = tile_mask(p, g, tile, scratch.keep);
      if (kind == TileKind::kSkip) continue;
      ScoreModifiers modifiers;
      const bool is_modified = has_modifiers(p) || kind == TileKind::kPartial;
      if (is_modified) {
        modifiers =
            score_modifiers(p, g, tile, rest_scale, kind == TileKind::kPartial ? scratch.keep : nullptr, scratch.bias);
        modifiers.tanh_tile = p.softcap != 0.0 ? scratch.tanh : nullptr;
      }
      if (p.dropout_p > 0.0) fill_dropout_tile(p, tile, scratch.dropout);
      if (is_additive<Operands>(p)) take_common_form(queries[block], additive_keys);
      const BackwardPanel<Operands> panel{p,
                                          scratch,
                                          is_modified ? &modifiers : nullptr,
                                          rest_scale,
                                          is_additive<Operands>(p) ? &queries[block] : nullptr,
                                          k_broadcast,
                                          v_broadcast,
                                          0,
                                          nk,
                                          block,
                                          gp.d_bias != nullptr,
                                          is_hard,
                                          key0};
      const bool is_trimmed = kind == TileKind::kPartial && p.mask == nullptr;
      if (is_trimmed) {
        run_trimmed(g, tile, panel);
      } else {
        for_each_panel(vectors_of(tile.rows), panel);
      }
      if (gp.d_bias != nullptr) add_d_bias(gp, tile, scratch.d_bias);

      // The products over rows read whole groups of keys: those past the last one weigh nothing.
      const char *weights, *ds_rows, *ds_columns;
      int64_t key_stride;
      if constexpr (Operands::kPairs) {
        if (!is_hard) memset(scratch.s_half + nk * kBlockRows, 0, kRowPad * kBlockRows * sizeof(uint16_t));
        memset(scratch.ds_half + nk * kBlockRows, 0, kRowPad * kBlockRows * sizeof(uint16_t));
        weights = reinterpret_cast<const char*>(scratch.s_half);
        ds_rows = reinterpret_cast<const char*>(scratch.ds_half);
        ds_columns = reinterpret_cast<const char*>(scratch.ds_pairs);
        key_stride = kBlockRows * 2;
      } else {
        if (!is_hard) memset(scratch.s + nk * kBlockRows, 0, kRowPad * kBlockRows * sizeof(float));
        memset(scratch.ds + nk * kBlockRows, 0, kRowPad * kBlockRows * sizeof(float));
        weights = reinterpret_cast<const char*>(scratch.s);
        ds_rows = ds_columns = reinterpret_cast<const char*>(scratch.ds);
        key_stride = kBlockRows * 4;
      }
      const TileUnits<Operands, true> row_units{is_trimmed ? &g : nullptr, &tile};
      const TileUnits<Operands, false> key_units{is_trimmed ? &g : nullptr, &tile};
      if (!is_hard) {
        for_each_panel(vectors_of(p.Dv),
                       AccumulateKeys<Operands>{weights, key_stride, nk, d_o_rows[block],
                                                scratch.dv + (key0 - j0) * dv_stride, dv_stride, row_units});
      }
      float* dq_block = dq + block * kBlockRows * dq_columns(p);
      float* dk_rows = scratch.dk + (key0 - j0) * dk_stride;
      if (is_additive<Operands>(p)) {
        const auto rows_of = [&](int64_t c, int64_t n) {
          return is_trimmed ? visible_rows(g, tile, c, n) : TileSpan{0, tile.rows};
        };
        add_additive_gradients(queries[block], additive_keys, scratch.w,
                               {scratch.ds, dq_block, dq_columns(p), dk_rows, scratch.dw}, rows_of);
        continue;
      }
      for_each_panel(vectors_of(p.D),
                     AccumulateKeys<Operands>{ds_rows, key_stride, nk, q_rows[block], dk_rows, dk_stride, row_units});
      for_each_panel(vectors_of(p.D), AccumulateRows<Operands>{ds_columns, kBlockRows * 4, tile.rows, k_vectors,
                                                               dq_block, dq_columns(p), key_units});
    }
  }
}

template <class Operands>
inline void backward_task_as(const AttentionGradParams& gp, const BackwardTask& task, char* memory) {
  using Element = typename Operands::Element;
  using Raw = typename Operands::Raw;
  const AttentionParams& p = gp.forward;
  const BackwardScratch scratch = backward_scratch<Operands>(gp, task.j1 - task.j0, task.dq_partial == nullptr,
                                                             task.hard != nullptr, memory, nullptr);
  const int64_t group = p.Hq / p.Hkv;
  const int64_t dk_stride = Operands::padded(p.D), dv_stride = Operands::padded(p.Dv);
  const int64_t padded_Lq = round_up(p.Lq, kBlockRows);
  const HardAttentionGradParams* hard = task.hard;
  const bool has_score_gradient = hard == nullptr || hard->d_log_prob != nullptr;
  if (hard == nullptr && is_small_backward(p)) {
    for (int64_t b = task.b0; b < task.b1; ++b) {
      for (int64_t hkv = task.hkv0; hkv < task.hkv1; ++hkv) {
        small_backward<Element>(gp, b, hkv, task.d_sinks_partial, scratch.dk, scratch.dv, scratch.dq);
      }
    }
    return;
  }
  for (int64_t b = task.b0; b < task.b1; ++b) {
    const MaskGeometry g = mask_geometry(p, b);
    const int64_t j1 = min_i64(task.j1, g.Lk);  // keys past the sequence's length are not read
    for (int64_t hkv = task.hkv0; hkv < task.hkv1; ++hkv) {
      const size_t rows = static_cast<size_t>(task.j1 - task.j0 + kRowPad);
      memset(scratch.dk, 0, rows * static_cast<size_t>(dk_stride) * sizeof(float));
      memset(scratch.dv, 0, rows * static_cast<size_t>(dv_stride) * sizeof(float));
      for (int64_t hq = hkv * group; hq < (hkv + 1) * group; ++hq) {
        float d_sink = 0.0f;
        if (is_additive<Operands>(p)) {
          load_w<Operands>(p, hq, scratch.w);
          memset(scratch.dw, 0, sizeof(float) * static_cast<size_t>(Operands::padded(p.D)));
        }
        for (int64_t i0 = 0; i0 < p.Lq; i0 += kSuperRows) {
          const int64_t i1 = min_i64(p.Lq, i0 + kSuperRows);
          float* dq = task.dq_partial != nullptr ? task.dq_partial + ((b * p.Hq + hq) * padded_Lq + i0) * dq_columns(p)
                                                 : scratch.dq;
          memset(dq, 0, sizeof(float) * static_cast<size_t>(round_up(i1 - i0, kColumnRows) * dq_columns(p)));
          const TileRange seen = j1 > task.j0 && has_score_gradient ? row_range(g, task.j0, j1) : TileRange{};
          const bool is_seen = seen.begin < i1 && seen.end > i0;
          if (hard != nullptr) {
            if (is_seen) prepare_hard_statistics(*hard, b, hq, i0, i1, scratch);
          } else if (is_seen || task.d_sinks_partial != nullptr) {
            d_sink += prepare_statistics<Operands>(gp, b, hq, i0, i1, scratch);
          }
          if (is_seen) {
            backward_super_block<Operands>(gp, g, b, hq, hkv, i0, i1, task.j0, j1, hard != nullptr, dq, scratch);
          }
          if (task.dq_partial == nullptr) {
            narrow_rows<Element>(row_at<Raw>(gp.dq, gp.dq_stride, b, hq, i0), gp.dq_stride[2], dq, dq_columns(p),
                                 i1 - i0, p.D);
          }
        }
        if (is_additive<Operands>(p)) {
          memcpy(task.dw_partial + (b * p.Hq + hq) * dq_columns(p), scratch.dw,
                 sizeof(float) * static_cast<size_t>(p.D));
        }
        if (task.d_sinks_partial != nullptr) task.d_sinks_partial[b * p.Hq + hq] = d_sink;
      }
      if (hard != nullptr && hard->d_o != nullptr) {
        scatter_d_o<Operands>(*hard, b, hkv, task.j0, task.j1, scratch.dv, dv_stride);
      }
      narrow_rows<Element>(row_at<Raw>(gp.dk, gp.dk_stride, b, hkv, task.j0), gp.dk_stride[2], scratch.dk, dk_stride,
                           task.j1 - task.j0, p.D);
      narrow_rows<Element>(row_at<Raw>(gp.dv, gp.dv_stride, b, hkv, task.j0), gp.dv_stride[2], scratch.dv, dv_stride,
                           task.j1 - task.j0, p.Dv);
    }
  }
}

template <class Operands>
inline void reduce_dq_as(const AttentionGradParams& gp, int64_t b, int64_t hq, int64_t i0, int64_t i1,
                         const float* partials, int64_t chunks, int64_t chunk_stride) {
  using Element = typename Operands::Element;
  using Raw = typename Operands::Raw;
  const AttentionParams& p = gp.forward;
  const float* head = partials + (b * p.Hq + hq) * round_up(p.Lq, kBlockRows) * dq_columns(p);
  for (int64_t i = i0; i < i1; ++i) {
    Raw* to = row_at<Raw>(gp.dq, gp.dq_stride, b, hq, i);
    for (int64_t c = 0; c < p.D; c += kLanes) {
      const float* from = head + i * dq_columns(p) + c;
      Vf sum = vload(from);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) sum = vadd(sum, vload(from + chunk * chunk_stride));
      Element::store_first(to + c, sum, p.D - c);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
