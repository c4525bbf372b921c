// The gradients of the scores of one tile, for the backward pass (backward.h, with the formulas): scores again, dP, and
// from them the weights that multiply dO, and dS'. And what that takes: a worker's memory, and statistics of the rows.
//
// Lanes are query rows, as in the forward pass. What is computed lies in the scratch, [key][row], as operands of the
// products that follow.
#pragma once

#include "cpu/additive.h"
#include "cpu/gemm.h"
#include "cpu/operands.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr int64_t kSuperRows = 512;
constexpr int64_t kSuperBlocks = kSuperRows / kBlockRows;

struct BackwardScratch {
  // Per block of rows:
  float* qt[kSuperBlocks];      // Q^T by panels, times the scale in float arithmetic
  float* d_ot[kSuperBlocks];    // dO^T by panels
  float* q_rows[kSuperBlocks];  // copies of Q and dO, where they are needed
  float* d_o_rows[kSuperBlocks];
  float* dq;           // [kSuperRows][dq_columns]
  float* row_max;      // [kSuperRows] each; 0 for rows that see nothing,
  float* inverse_sum;  // and 0
  float* delta;        // hard attention: d_log_prob
  uint32_t* index;     // hard attention: the row's key
  bool* is_saturated;  // [kSuperRows]: one key has all of the row's weight
  // Per chunk of keys:
  float* dk;  // [chunk keys + kRowPad][padded D]
  float* dv;
  // Per block of keys, or tile:
  float* k;  // copies of K and V as broadcast operands, of K as vector operand
  float* v;
  float* k_rows;
  float* w;          // additive scores: [padded D],
  float* dw;         // and its gradient by one head
  float* s;          // [keys + kRowPad][kBlockRows]: scores, then weights
  float* ds;         // dP, then dS
  uint16_t* s_half;  // bfloat16 arithmetic: weights and dS rounded, [key][row],
  uint16_t* ds_half;
  uint32_t* ds_pairs;  // and dS in pairs of keys, [key / 2][row]
  float* bias;         // [keys][kBlockRows] each
  float* dropout;
  float* tanh;
  float* d_bias;
  uint64_t* keep;  // [keys]
};

FASTATTN_FN int64_t dq_columns(const AttentionParams& p) { return round_up(p.D, 2 * kLanes); }

// Hard attention needs neither dP = dO V^T nor weights for dO, and takes no memory for dO^T, dO, V and those.
template <class Operands>
inline BackwardScratch backward_scratch(const AttentionGradParams& gp, int64_t chunk_keys, bool dq_in_scratch,
                                        bool is_hard, char* memory, size_t* bytes) {
  const AttentionParams& p = gp.forward;
  constexpr int64_t kTile = (kMaxBlockKeys + kRowPad) * kBlockRows;
  const int64_t blocks = min_i64(kSuperBlocks, (p.Lq + kBlockRows - 1) / kBlockRows);
  Arena arena{memory};
  BackwardScratch s{};
  for (int64_t i = 0; i < blocks; ++i) {
    s.qt[i] = arena.take<float>(Operands::transposed_columns(p.D) * kBlockRows);
    s.d_ot[i] = arena.take<float>(is_hard ? 0 : Operands::transposed_columns(p.Dv) * kBlockRows);
    s.q_rows[i] = arena.take<float>(Operands::copy_floats(kBlockRows, p.D));
    s.d_o_rows[i] = arena.take<float>(is_hard ? 0 : Operands::copy_floats(kBlockRows, p.Dv));
  }
  s.dq = arena.take<float>(dq_in_scratch ? blocks * kBlockRows * dq_columns(p) : 0);
  s.row_max = arena.take<float>(kSuperRows);
  s.inverse_sum = arena.take<float>(kSuperRows);
  s.delta = arena.take<float>(kSuperRows);
  s.index = arena.take<uint32_t>(is_hard ? kSuperRows : 0);
  s.is_saturated = arena.take<bool>(is_hard ? 0 : kSuperRows);
  s.dk = arena.take<float>((chunk_keys + kRowPad) * Operands::padded(p.D));
  s.dv = arena.take<float>((chunk_keys + kRowPad) * Operands::padded(p.Dv));
  s.k = arena.take<float>(Operands::copy_floats(kMaxBlockKeys, p.D));
  s.v = arena.take<float>(is_hard ? 0 : Operands::copy_floats(kMaxBlockKeys, p.Dv));
  s.k_rows = arena.take<float>(Operands::copy_floats(kMaxBlockKeys, p.D));
  s.w = arena.take<float>(is_additive<Operands>(p) ? Operands::padded(p.D) : 0);
  s.dw = arena.take<float>(is_additive<Operands>(p) ? Operands::padded(p.D) : 0);
  s.s = arena.take<float>(kTile);
  s.ds = arena.take<float>(kTile);
  s.s_half = arena.take<uint16_t>(Operands::kPairs && !is_hard ? kTile : 0);
  s.ds_half = arena.take<uint16_t>(Operands::kPairs ? kTile : 0);
  s.ds_pairs = arena.take<uint32_t>(Operands::kPairs ? kTile : 0);
  s.bias = arena.take<float>(p.bias != nullptr ? kTile : 0);
  s.dropout = arena.take<float>(p.dropout_p > 0.0 ? kTile : 0);
  s.tanh = arena.take<float>(p.softcap != 0.0 ? kTile : 0);
  s.d_bias = arena.take<float>(gp.d_bias != nullptr ? kTile : 0);
  s.keep = arena.take<uint64_t>(kMaxBlockKeys);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// Row statistics of rows [i0, i1), by super-block position; rows up to the next multiple of kBlockRows weigh nothing.
// Returns this stretch's part of the sink's gradient.
template <class Operands>
inline float prepare_statistics(const AttentionGradParams& gp, int64_t b, int64_t hq, int64_t i0, int64_t i1,
                                const BackwardScratch& scratch) {
  using Raw = typename Operands::Raw;
  const AttentionParams& p = gp.forward;
  const int64_t first = stat_index(p, b, hq, 0);
  const float* row_max = static_cast<const float*>(p.row_max) + first;
  const float* row_sum = static_cast<const float*>(p.row_sum) + first;
  const float* d_lse = gp.d_lse != nullptr ? static_cast<const float*>(gp.d_lse) + first : nullptr;
  const bool has_sinks = gp.d_sinks != nullptr;
  const float sink = has_sinks ? static_cast<const float*>(p.sinks)[hq] : 0.0f;
  float d_sink = 0.0f;
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t at = i - i0;
    const bool is_empty = row_sum[i] == 0.0f;
    scratch.row_max[at] = is_empty ? 0.0f : row_max[i];
    scratch.inverse_sum[at] = is_empty ? 0.0f : 1.0f / row_sum[i];
    scratch.is_saturated[at] = row_sum[i] == 1.0f;
    float delta = 0.0f;
    if (!is_empty) {
      // Where one key has all the weight, dP - delta is 0 but for rounding, which o's may make large: see
      // clear_saturated_rows.
      if (!scratch.is_saturated[at]) {
        delta = dot<typename Operands::Element>(row_at<const Raw>(gp.d_o, gp.d_o_stride, b, hq, i),
                                                row_at<const Raw>(p.o, p.o_stride, b, hq, i), p.Dv);
      }
      if (d_lse != nullptr) delta -= d_lse[i];
      if (has_sinks) d_sink -= __builtin_expf(sink - row_max[i]) * scratch.inverse_sum[at] * delta;
    }
    scratch.delta[at] = delta;
  }
  for (int64_t at = i1 - i0; at < round_up(i1 - i0, kBlockRows); ++at) {
    scratch.row_max[at] = scratch.inverse_sum[at] = scratch.delta[at] = 0.0f;
  }
  return d_sink;
}

// Row statistics for hard attention, whose dS takes d_log_prob and the index of each row.
inline void prepare_hard_statistics(const HardAttentionGradParams& hp, int64_t b, int64_t hq, int64_t i0, int64_t i1,
                                    const BackwardScratch& scratch) {
  const AttentionParams& p = hp.forward;
  const int64_t first = stat_index(p, b, hq, 0);
  for (int64_t at = 0; at < round_up(i1 - i0, kBlockRows); ++at) {
    const int64_t row = first + i0 + at;
    const float l = i0 + at < i1 ? static_cast<const float*>(p.row_sum)[row] : 0.0f;
    const bool is_empty = l == 0.0f;
    scratch.row_max[at] = is_empty ? 0.0f : static_cast<const float*>(p.row_max)[row];
    scratch.inverse_sum[at] = is_empty ? 0.0f : 1.0f / l;
    scratch.delta[at] = is_empty ? 0.0f : static_cast<const float*>(hp.d_log_prob)[row];
    scratch.index[at] = is_empty ? 0xFFFFFFFFu : static_cast<uint32_t>(hp.index[row]);
  }
}

// Takes rows with a single weight of 1 out of dO^T, so that their dP is 0, as their delta is. Without it the rounding
// of o to 16 bits would leave a gradient where there is none, as for every row when Lk = 1.
template <class Operands>
inline void clear_saturated_rows(float* d_ot, const bool* is_saturated, int64_t rows, int64_t Dv) {
  for (int64_t r = 0; r < rows; ++r) {
    if (!is_saturated[r]) continue;
    float* column = d_ot + panel_offset(r, Operands::transposed_columns(Dv));
    for (int64_t unit = 0; unit < Operands::units(Dv); ++unit) column[unit * kPanelRows] = 0.0f;
  }
}

// Scores again, dP, and from them weights and dS, for NV vectors of rows.
template <class Operands>
struct BackwardPanel {
  const AttentionParams& p;
  const BackwardScratch& scratch;
  const ScoreModifiers* modifiers;    // null: scores are the products, times `scale`
  float scale;                        // not yet in Q
  const TanhRows<Operands>* queries;  // additive scores; null: dot products
  Operand k, v;
  int64_t first_key, nk;  // of the tile's keys, those to compute; k and v start at first_key
  int64_t block;          // of the super-block's rows
  bool wants_d_bias;
  bool is_hard;      // no dP: d_ot and v are not there
  int64_t tile_key;  // the tile's first

  template <int NV>
  inline void run(int v0) const {
    using Unit = typename Operands::Unit;
    constexpr int64_t kRow = kPanelRows * 4;
    const int64_t lane0 = v0 * kLanes;
    const int64_t first = first_key * kBlockRows + lane0;
    const int64_t rows = max_i64(nk, row_major_rows(NV));
    const float* qt = scratch.qt[block] + panel_offset(lane0, Operands::transposed_columns(p.D));
    const float* d_ot = scratch.d_ot[block] + panel_offset(lane0, Operands::transposed_columns(p.Dv));
    if (Operands::kPairs || queries == nullptr) {
      gemm_row_major<Unit, NV, false>(k.data, k.stride_bytes, rows, reinterpret_cast<const char*>(qt), kRow,
                                      Operands::units(p.D), scratch.s + first, kBlockRows, nullptr);
    } else {
      additive_scores<NV>(*queries, v0, k, scratch.w, nk, scratch.s + first, kBlockRows);
    }
    if (modifiers != nullptr) {
      Vf unused[NV];
      for (int i = 0; i < NV; ++i) unused[i] = vzero();
      modify_scores<NV>(*modifiers, scratch.s + first, kBlockRows, first_key, nk, v0, unused);
    }
    if (is_hard) return hard_gradients<NV>(lane0);
    gemm_row_major<Unit, NV, false>(v.data, v.stride_bytes, rows, reinterpret_cast<const char*>(d_ot), kRow,
                                    Operands::units(p.Dv), scratch.ds + first, kBlockRows, nullptr);

    Vf base[NV], shift[NV], inverse_sum[NV], delta[NV];
    for (int i = 0; i < NV; ++i) {
      const int64_t row = block * kBlockRows + lane0 + i * kLanes;
      base[i] = vload(scratch.row_max + row);
      shift[i] = vmul(base[i], vset(-kLog2e));
      inverse_sum[i] = vload(scratch.inverse_sum + row);
      delta[i] = vload(scratch.delta + row);
    }
    const int64_t end = first_key + nk;
    for (int64_t c = first_key; c < end; c += Operands::kPairs ? 2 : 1) {
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const int64_t at = c * kBlockRows + lane0 + i * kLanes;
        if constexpr (!Operands::kPairs) {
          Vf w, g;
          gradient_at(at, base[i], shift[i], inverse_sum[i], delta[i], &w, &g);
          vstore(scratch.s + at, w);
          vstore(scratch.ds + at, g);
        }
#if FASTATTN_BF16_DOT
        else {
          Vf w[2] = {vzero(), vzero()}, g[2] = {vzero(), vzero()};
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            if (c + h < end) {
              gradient_at(at + h * kBlockRows, base[i], shift[i], inverse_sum[i], delta[i], &w[h], &g[h]);
            }
          }
          const Vi weights = vnarrow(w[0], w[1]);
          vstore_low_half(scratch.s_half + at, weights);
          vstore_high_half(scratch.s_half + at + kBlockRows, weights);
          store_gradients(c, lane0 + i * kLanes, g[0], g[1]);
        }
#endif
      }
    }
  }

  // One vector of hard attention: scale * dS.
  FASTATTN_INLINE Vf hard_gradient(int64_t c, int64_t lane, Vf base, Vf inverse_sum, Vf d_score, Vi index) const {
    const Vf x = vmul(vload(scratch.s + c * kBlockRows + lane), vset(modifiers != nullptr ? 1.0f : scale));
    const Vf weight = vmul(vexp(vsub(x, base)), inverse_sum);
    const Vm is_taken = viequal(index, viset(static_cast<uint32_t>(tile_key + c)));
    return vmul(d_score, vsub(vselect(is_taken, vset(1.0f), vzero()), weight));
  }

  // scale * dS of hard attention, which needs no dP.
  template <int NV>
  inline void hard_gradients(int64_t lane0) const {
    Vf base[NV], inverse_sum[NV], d_score[NV];
    Vi index[NV];
    for (int i = 0; i < NV; ++i) {
      const int64_t row = block * kBlockRows + lane0 + i * kLanes;
      base[i] = vload(scratch.row_max + row);
      inverse_sum[i] = vload(scratch.inverse_sum + row);
      d_score[i] = vmul(vload(scratch.delta + row), vset(static_cast<float>(p.scale)));
      index[i] = viload(scratch.index + row);
    }
    const int64_t end = first_key + nk;
    for (int64_t c = first_key; c < end; c += Operands::kPairs ? 2 : 1) {
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const int64_t lane = lane0 + i * kLanes;
        const Vf gradient = hard_gradient(c, lane, base[i], inverse_sum[i], d_score[i], index[i]);
        if constexpr (!Operands::kPairs) vstore(scratch.ds + c * kBlockRows + lane, gradient);
#if FASTATTN_BF16_DOT
        if constexpr (Operands::kPairs) {
          const bool has_next = c + 1 < end;
          store_gradients(
              c, lane, gradient,
              has_next ? hard_gradient(c + 1, lane, base[i], inverse_sum[i], d_score[i], index[i]) : vzero());
        }
#endif
      }
    }
  }

#if FASTATTN_BF16_DOT
  // dS of keys c and c + 1, rounded, in the layouts of both products that follow.
  FASTATTN_INLINE void store_gradients(int64_t c, int64_t lane, Vf low, Vf high) const {
    const Vi gradients = vnarrow(low, high);
    vstore_low_half(scratch.ds_half + c * kBlockRows + lane, gradients);
    vstore_high_half(scratch.ds_half + (c + 1) * kBlockRows + lane, gradients);
    vistore(scratch.ds_pairs + c / 2 * kBlockRows + lane, vinterleave_halves(gradients));
  }
#endif

  // One vector: the weight that multiplies dO, and scale * dS'.
  FASTATTN_INLINE void gradient_at(int64_t at, Vf base, Vf shift, Vf inverse_sum, Vf delta, Vf* weight,
                                   Vf* gradient) const {
    const Vf x = vload(scratch.s + at);
    // Modified scores may be large and equal (a finite mask): subtract first. Plain bfloat16 products may be scaled
    // and shifted in one operation, at an error far below bfloat16's.
    const bool one_step = Operands::kPairs && modifiers == nullptr;
    const Vf t = one_step ? vfma(x, vset(scale * kLog2e), shift) : vmul(vsub(x, base), vset(kLog2e));
    const Vf w = vmul(vexp2<Operands::kExp2Degree>(t), inverse_sum);
    Vf dw = vload(scratch.ds + at);
    *weight = w;
    if (p.dropout_p > 0.0) {
      const Vf z = vload(scratch.dropout + at);
      *weight = vmul(w, z);
      dw = vmul(dw, z);
    }
    Vf g = vmul(w, vsub(dw, delta));
    if (wants_d_bias) vstore(scratch.d_bias + at, g);
    if (p.softcap != 0.0) {
      const Vf tanh = vload(scratch.tanh + at);
      g = vmul(g, vsub(vset(1.0f), vmul(tanh, tanh)));
    }
    *gradient = vmul(g, vset(product_scale(p)));
  }
};

// A tile that the mask geometry cuts: each vector of rows takes only the keys that one of its rows sees; the rest of
// the tile weighs nothing, and must say so, for the products that follow read it in groups of keys and of rows.
template <class Operands>
inline void run_trimmed(const MaskGeometry& g, const Tile& tile, const BackwardPanel<Operands>& panel) {
  const BackwardScratch& scratch = panel.scratch;
  const size_t elements = static_cast<size_t>(tile.nk * kBlockRows);
  if constexpr (Operands::kPairs) {
    if (!panel.is_hard) memset(scratch.s_half, 0, elements * sizeof(uint16_t));
    memset(scratch.ds_half, 0, elements * sizeof(uint16_t));
    memset(scratch.ds_pairs, 0, elements / 2 * sizeof(uint32_t) + kBlockRows * sizeof(uint32_t));
  } else {
    if (!panel.is_hard) memset(scratch.s, 0, elements * sizeof(float));
    memset(scratch.ds, 0, elements * sizeof(float));
  }
  if (panel.wants_d_bias) memset(scratch.d_bias, 0, elements * sizeof(float));
  BackwardPanel<Operands> part = panel;
  for (int64_t r = 0; r < tile.rows; r += kLanes) {
    const TileSpan span = visible_keys(g, tile, r, min_i64(kLanes, tile.rows - r), kRowPad);
    if (span.begin >= span.end) continue;
    part.first_key = span.begin;
    part.nk = span.end - span.begin;
    part.k.data = panel.k.data + span.begin * panel.k.stride_bytes;
    if (!panel.is_hard) part.v.data = panel.v.data + span.begin * panel.v.stride_bytes;
    part.template run<1>(static_cast<int>(r / kLanes));
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
