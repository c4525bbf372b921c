// Hard attention, forward: each row takes the value of one key, drawn with the probabilities softmax(s) or the one with
// the largest score (core/params.h), in one pass over the keys.
//
// Lanes are query rows, as the scores have them (scores.h). A draw is the key with the largest w_j / e_j, where w =
// exp(s - m) is what the row sum needs anyhow, and e_j is exponentially distributed (core/gumbel.h). Candidates are
// compared as w_j e_best > w_best e_j, which spares the division; w_best is rescaled with the row sum when the maximum
// m grows. A hidden key has w = 0 and never wins. No product with V: its rows are copied.
#pragma once

#include "cpu/scores.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// One worker's memory. [kBlockRows] each: the best key so far, its score, and what it is compared by.
struct DrawScratch {
  ScoreScratch scores;
  RowScratch rows;
  uint32_t* key;
  float* score;
  float* weight;
  float* variate;
};

template <class Operands>
inline DrawScratch draw_scratch(const AttentionParams& p, char* memory, size_t* bytes) {
  Arena arena{memory};
  DrawScratch s;
  s.scores = score_scratch<Operands>(p, &arena);
  s.rows = row_scratch(&arena);
  s.key = arena.take<uint32_t>(kBlockRows);
  s.score = arena.take<float>(kBlockRows);
  s.weight = arena.take<float>(kBlockRows);
  s.variate = arena.take<float>(kBlockRows);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// Consumer of scores.
struct Draw {
  static constexpr bool kServesAdditive = false;
  const AttentionParams& p;
  const DrawScratch& scratch;
  bool is_sampled;
  Tile tile{};

  inline void begin_tile(const Tile& next) { tile = next; }

  inline void clear() const {
    clear_rows(scratch.rows);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      scratch.key[r] = 0;
      scratch.score[r] = -__builtin_inff();
      scratch.weight[r] = 0.0f;
      scratch.variate[r] = 1.0f;
    }
  }

  template <int NV>
  struct Best {
    Vi key[NV];
    Vf score[NV], weight[NV], variate[NV];
  };

  template <int NV>
  inline void take(const PanelScores<NV>& panel) const {
    Vf base[NV], moved[NV], sum[NV];
    raise_row_max(scratch.rows, panel, base, moved);
    Best<NV> best;
    for (int i = 0; i < NV; ++i) {
      const int64_t at = (panel.v0 + i) * kLanes;
      sum[i] = vzero();
      best.key[i] = panel.is_first ? viset(0) : viload(scratch.key + at);
      best.score[i] = panel.is_first ? vset(-__builtin_inff()) : vload(scratch.score + at);
      best.weight[i] = panel.is_first ? vzero() : vmul(vload(scratch.weight + at), vload(scratch.rows.rescale + at));
      best.variate[i] = panel.is_first ? vset(1.0f) : vload(scratch.variate + at);
    }
    if (is_sampled) {
      draw(panel, base, sum, best);
    } else {
      find_largest(panel, base, sum, best);
    }
    add_row_sum(scratch.rows, panel, sum);
    for (int i = 0; i < NV; ++i) {
      const int64_t at = (panel.v0 + i) * kLanes;
      vistore(scratch.key + at, best.key[i]);
      vstore(scratch.score + at, best.score[i]);
      vstore(scratch.weight + at, best.weight[i]);
      vstore(scratch.variate + at, best.variate[i]);
    }
  }

  // Philox has four words at a time, for the keys of a multiple of four.
  template <int NV>
  inline void draw(const PanelScores<NV>& panel, const Vf (&base)[NV], Vf (&sum)[NV], Best<NV>& best) const {
    const Vf scale = vset(panel.scale);
    const int64_t j0 = tile.j0 + panel.first_key, j1 = j0 + panel.nk;
    const uint32_t bh = static_cast<uint32_t>(tile.b * p.Hq + tile.hq);
    for (int64_t quad = j0 & ~int64_t{3}; quad < j1; quad += 4) {
      Vf variate[NV][4];
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const Vi row = viadd(viota(), viset(static_cast<uint32_t>(tile.i0 + (panel.v0 + i) * kLanes)));
        Vi words[4];
        vphilox(p.seed, static_cast<uint32_t>(quad >> 2), row, bh, static_cast<uint32_t>(p.offset), words);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) variate[i][w] = vexponential(words[w]);
      }
      for (int64_t j = max_i64(quad, j0); j < min_i64(quad + 4, j1); ++j) {
        const Vi key = viset(static_cast<uint32_t>(j));
        const float* s = panel.s + (j - j0) * kPanelRows;
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) {
          const Vf score = vmul(vload(s + i * kLanes), scale);
          const Vf weight = vexp(vsub(score, base[i]));
          sum[i] = vadd(sum[i], weight);
          const Vf e = variate[i][j - quad];
          const Vm wins = vless(vmul(best.weight[i], e), vmul(weight, best.variate[i]));
          best.key[i] = viselect(wins, key, best.key[i]);
          best.score[i] = vselect(wins, score, best.score[i]);
          best.weight[i] = vselect(wins, weight, best.weight[i]);
          best.variate[i] = vselect(wins, e, best.variate[i]);
        }
      }
    }
  }

  template <int NV>
  inline void find_largest(const PanelScores<NV>& panel, const Vf (&base)[NV], Vf (&sum)[NV], Best<NV>& best) const {
    const Vf scale = vset(panel.scale);
    for (int64_t c = 0; c < panel.nk; ++c) {
      const Vi key = viset(static_cast<uint32_t>(tile.j0 + panel.first_key + c));
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const Vf score = vmul(vload(panel.s + c * kPanelRows + i * kLanes), scale);
        sum[i] = vadd(sum[i], vexp(vsub(score, base[i])));
        const Vm wins = vless(best.score[i], score);
        best.key[i] = viselect(wins, key, best.key[i]);
        best.score[i] = vselect(wins, score, best.score[i]);
      }
    }
  }
};

// Writes index, log_prob and o.
template <class Operands>
inline void finish_draw(const HardAttentionParams& hp, const ForwardItem& item, const DrawScratch& scratch) {
  using Raw = typename Operands::Raw;
  const AttentionParams& p = hp.attention;
  const MaskGeometry g = mask_geometry(p, item.b);
  const int64_t hkv = item.hq / (p.Hq / p.Hkv);
  const size_t row_bytes = static_cast<size_t>(p.Dv) * sizeof(Raw);
  for (int64_t i = item.i0; i < item.i1; ++i) {
    const int64_t r = i - item.i0, at = (item.b * p.Hq + item.hq) * p.Lq + i;
    const float m = scratch.rows.row_max[r], l = scratch.rows.row_sum[r];
    Raw* o = row_at<Raw>(p.o, p.o_stride, item.b, item.hq, i);
    int64_t index = scratch.key[r];
    float log_prob = (scratch.score[r] - m) - __builtin_logf(l);
    if (l == 0.0f) {
      index = -1;
      log_prob = 0.0f;
    } else if (l != l || scratch.score[r] == -__builtin_inff()) {
      // A NaN among the scores: no key is better than another, and none may have won. Scores do not count here: one of
      // -inf may come before the NaN.
      index = first_visible_key(p, g, item.b, item.hq, i);
      log_prob = __builtin_nanf("");
    }
    hp.index[at] = index;
    static_cast<float*>(hp.log_prob)[at] = log_prob;
    if (index < 0) {
      memset(o, 0, row_bytes);
    } else {
      memcpy(o, row_at<const Raw>(p.v, p.v_stride, item.b, hkv, index), row_bytes);
    }
  }
}

template <class Operands>
inline void hard_item_as(const HardAttentionParams& hp, const ForwardItem& item, char* memory) {
  const AttentionParams& p = hp.attention;
  const DrawScratch scratch = draw_scratch<Operands>(p, memory, nullptr);
  Draw consumer{p, scratch, hp.is_sampled};
  walk_scores<Operands>(p, item, 0, p.Lk, scratch.scores, consumer);
  finish_rows(p, item, 1.0f, scratch.rows);
  write_statistics(p, item, scratch.rows);
  finish_draw<Operands>(hp, item, scratch);
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
