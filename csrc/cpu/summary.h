// What there is to know about attention weights, without holding them (core/params.h).
//
//   entropy = log(l) - sum_j w_j (s_j - m) / l        w = exp(s - m), l = sum of w, the sink's included
//
// and the largest weights of each row, in one pass over the keys. Sums over rows, the mass of each key, take a second
// pass, once the row statistics are known: an item owns a chunk of keys of one head and adds up the blocks of rows in
// order, so that a sum has the same bits whoever computes it.
//
// Lanes are query rows, as the scores have them (scores.h). The largest scores of a vector of rows are lists [top_k]
// of vectors, each lane sorted; the last vector is the threshold that a score must pass to be inserted, which is done
// for all lanes of a key at once. Not for additive scores.
#pragma once

#include "cpu/scores.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

constexpr uint32_t kNoKey = 0xFFFFFFFFu;

// A score further than this below the maximum weighs nothing; the limit keeps 0 * -inf out of sums.
constexpr float kLowestDistance = -200.0f;

struct SummaryScratch {
  ScoreScratch scores;
  RowScratch rows;
  float* distance;  // [kBlockRows]: sum of w (s - m)
  float* key_max;   // [kBlockRows]: row_max and row_sum before the sink joins
  float* key_sum;
  float* top;         // [kBlockRows / kLanes][top_k][kLanes]: scores,
  uint32_t* top_key;  // and their keys
};

// Largest weights that are asked for.
FASTATTN_FN int64_t wanted_top_k(const SummaryParams& sp) {
  return sp.top_weights != nullptr || sp.top_index != nullptr ? sp.top_k : 0;
}

template <class Operands>
inline SummaryScratch summary_scratch(const SummaryParams& sp, char* memory, size_t* bytes) {
  Arena arena{memory};
  SummaryScratch s;
  s.scores = score_scratch<Operands>(sp.attention, &arena);
  s.rows = row_scratch(&arena);
  s.distance = arena.take<float>(kBlockRows);
  s.key_max = arena.take<float>(kBlockRows);
  s.key_sum = arena.take<float>(kBlockRows);
  s.top = arena.take<float>(wanted_top_k(sp) * kBlockRows);
  s.top_key = arena.take<uint32_t>(wanted_top_k(sp) * kBlockRows);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// Inserts a key's scores into the sorted lists of a vector of rows; returns the lists' last scores. Where a score goes
// is decided by itself, also for what it pushes down: of equal scores the lower key stays first.
inline Vf insert_scores(float* top, uint32_t* top_key, int64_t top_k, Vf score, Vi key) {
  constexpr int64_t kStride = 8;
  int64_t t = 0;
  while (t + kStride < top_k && !vany(vless(vload(top + (t + kStride - 1) * kLanes), score))) t += kStride;
  Vf carried = score, last = vzero();
  for (; t < top_k; ++t) {
    const Vf held = vload(top + t * kLanes);
    const Vi held_key = viload(top_key + t * kLanes);
    const Vm goes_before = vless(held, score);
    last = vselect(goes_before, carried, held);
    vstore(top + t * kLanes, last);
    vistore(top_key + t * kLanes, viselect(goes_before, key, held_key));
    carried = vselect(goes_before, held, carried);
    key = viselect(goes_before, held_key, key);
  }
  return last;
}

// Consumer of scores.
struct Summarise {
  static constexpr bool kServesAdditive = false;
  const SummaryScratch& scratch;
  int64_t top_k;
  Tile tile{};

  inline void begin_tile(const Tile& next) { tile = next; }

  inline void clear() const {
    clear_rows(scratch.rows);
    memset(scratch.distance, 0, sizeof(float) * kBlockRows);
    clear_top(0, kBlockRows / kLanes);
  }

  inline void clear_top(int64_t first, int64_t vectors) const {
    for (int64_t at = first * top_k * kLanes; at < (first + vectors) * top_k * kLanes; at += kLanes) {
      vstore(scratch.top + at, vset(-__builtin_inff()));
      vistore(scratch.top_key + at, viset(kNoKey));
    }
  }

  template <int NV>
  inline void take(const PanelScores<NV>& panel) const {
    if (top_k > 0) {
      if (panel.is_first) clear_top(panel.v0, NV);
      sums<NV, true>(panel);
    } else {
      sums<NV, false>(panel);
    }
  }

  template <int NV, bool kHasTop>
  inline void sums(const PanelScores<NV>& panel) const {
    const RowScratch& rows = scratch.rows;
    Vf base[NV], moved[NV], sum[NV], distance[NV], threshold[NV];
    raise_row_max(rows, panel, base, moved);
    for (int i = 0; i < NV; ++i) {
      const int64_t at = (panel.v0 + i) * kLanes;
      sum[i] = distance[i] = threshold[i] = vzero();
      if (!panel.is_first) {
        // All that has been summed is further below the maximum now.
        const Vf further = vmax(vset(kLowestDistance), moved[i]);
        distance[i] =
            vmul(vload(rows.rescale + at), vfma(further, vload(rows.row_sum + at), vload(scratch.distance + at)));
      }
      if constexpr (kHasTop) threshold[i] = vload(scratch.top + (panel.v0 + i + 1) * top_k * kLanes - kLanes);
    }
    const Vf scale = vset(panel.scale);
    for (int64_t c = 0; c < panel.nk; ++c) {
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const Vf score = vmul(vload(panel.s + c * kPanelRows + i * kLanes), scale);
        const Vf below = vsub(score, base[i]);
        const Vf weight = vexp(below);
        sum[i] = vadd(sum[i], weight);
        distance[i] = vfma(weight, vmax(vset(kLowestDistance), below), distance[i]);
        if constexpr (kHasTop) {
          if (__builtin_expect(vany(vless(threshold[i], score)), 0)) {
            const int64_t list = (panel.v0 + i) * top_k * kLanes;
            threshold[i] = insert_scores(scratch.top + list, scratch.top_key + list, top_k, score,
                                         viset(static_cast<uint32_t>(tile.j0 + panel.first_key + c)));
          }
        }
      }
    }
    add_row_sum(rows, panel, sum);
    for (int i = 0; i < NV; ++i) vstore(scratch.distance + (panel.v0 + i) * kLanes, distance[i]);
  }
};

// Writes entropy, max_weight and the largest weights, after the sink has joined; rows.rescale is what
// exp(score - key_max) is multiplied by.
inline void finish_summary(const SummaryParams& sp, const ForwardItem& item, const SummaryScratch& scratch) {
  const AttentionParams& p = sp.attention;
  const RowScratch& rows = scratch.rows;
  const int64_t first = (item.b * p.Hq + item.hq) * p.Lq + item.i0, count = item.i1 - item.i0;
  if (sp.entropy != nullptr) {
    float* entropy = static_cast<float*>(sp.entropy) + first;
    const float sink = p.sinks != nullptr ? static_cast<const float*>(p.sinks)[item.hq] : -__builtin_inff();
    for (int64_t r = 0; r < count; ++r) {
      const float m = rows.row_max[r], l = rows.row_sum[r];
      // A joint maximum puts the keys further below it.
      const float further = scratch.key_max[r] - m, sink_below = sink - m;
      const float keys =
          scratch.distance[r] + scratch.key_sum[r] * (further > kLowestDistance ? further : kLowestDistance);
      float mean = rows.rescale[r] * keys;
      if (sink_below > kLowestDistance) mean += __builtin_expf(sink_below) / l * sink_below;
      entropy[r] = l == 0.0f ? 0.0f : __builtin_logf(l) - mean;
    }
  }
  if (sp.max_weight != nullptr) {
    memcpy(static_cast<float*>(sp.max_weight) + first, rows.rescale, sizeof(float) * static_cast<size_t>(count));
  }
  const int64_t top_k = wanted_top_k(sp);
  for (int64_t r0 = 0; r0 < count && top_k > 0; r0 += kLanes) {
    float* top = scratch.top + r0 * top_k;
    const uint32_t* top_key = scratch.top_key + r0 * top_k;
    const Vf key_max = vload(scratch.key_max + r0), factor = vload(rows.rescale + r0);
    const Vf base = vselect(vequal(key_max, vset(-__builtin_inff())), vzero(), key_max);
    for (int64_t t = 0; t < top_k; ++t) {
      vstore(top + t * kLanes, vmul(vexp(vsub(vload(top + t * kLanes), base)), factor));
    }
    for (int64_t r = r0; r < count && r < r0 + kLanes; ++r) {
      for (int64_t t = 0; t < top_k; ++t) {
        const int64_t from = t * kLanes + r - r0, to = (first + r) * top_k + t;
        if (sp.top_weights != nullptr) static_cast<float*>(sp.top_weights)[to] = top[from];
        if (sp.top_index != nullptr)
          sp.top_index[to] = top_key[from] == kNoKey ? -1 : static_cast<int64_t>(top_key[from]);
      }
    }
  }
}

template <class Operands>
inline void summary_item_as(const SummaryParams& sp, const ForwardItem& item, char* memory) {
  const AttentionParams& p = sp.attention;
  const SummaryScratch scratch = summary_scratch<Operands>(sp, memory, nullptr);
  Summarise consumer{scratch, wanted_top_k(sp)};
  walk_scores<Operands>(p, item, 0, p.Lk, scratch.scores, consumer);
  memcpy(scratch.key_max, scratch.rows.row_max, sizeof(float) * kBlockRows);
  memcpy(scratch.key_sum, scratch.rows.row_sum, sizeof(float) * kBlockRows);
  finish_rows(p, item, 1.0f, scratch.rows);
  write_statistics(p, item, scratch.rows);
  finish_summary(sp, item, scratch);
}

struct KeyMassScratch {
  ScoreScratch scores;
  float* base;         // [kBlockRows]: row maxima, 0 for rows that see nothing,
  float* inverse_sum;  // and 0
  float* sums;         // [chunk keys][kLanes]: a lane adds up every kLanes-th row
};

template <class Operands>
inline KeyMassScratch key_mass_scratch(const SummaryParams& sp, int64_t chunk_keys, char* memory, size_t* bytes) {
  Arena arena{memory};
  KeyMassScratch s;
  s.scores = score_scratch<Operands>(sp.attention, &arena);
  s.base = arena.take<float>(kBlockRows);
  s.inverse_sum = arena.take<float>(kBlockRows);
  s.sums = arena.take<float>(chunk_keys * kLanes);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// Consumer of scores: adds the weights of a block of rows to the sums of a chunk of keys.
struct KeyMass {
  static constexpr bool kServesAdditive = false;
  const KeyMassScratch& scratch;
  int64_t first_key;    // of the chunk
  uint64_t rows_count;  // bit r: row r of the block does
  Tile tile{};

  inline void begin_tile(const Tile& next) { tile = next; }
  inline void clear() const {}

  template <int NV>
  inline void take(const PanelScores<NV>& panel) const {
    Vf base[NV], inverse_sum[NV];
    Vm counts[NV];
    for (int i = 0; i < NV; ++i) {
      base[i] = vload(scratch.base + (panel.v0 + i) * kLanes);
      inverse_sum[i] = vload(scratch.inverse_sum + (panel.v0 + i) * kLanes);
      counts[i] = vmask_from_bits(rows_count >> ((panel.v0 + i) * kLanes));
    }
    const Vf scale = vset(panel.scale), minus_infinity = vset(-__builtin_inff());
    float* sums = scratch.sums + (tile.j0 + panel.first_key - first_key) * kLanes;
    for (int64_t c = 0; c < panel.nk; ++c) {
      Vf weight[NV];
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        const Vf score = vmul(vload(panel.s + c * kPanelRows + i * kLanes), scale);
        // Selected, not multiplied by 0: a row that does not count, or does not see this key, may be NaN.
        const Vf own = vselect(counts[i], vmul(vexp(vsub(score, base[i])), inverse_sum[i]), vzero());
        weight[i] = vselect(vequal(score, minus_infinity), vzero(), own);
      }
      Vf sum = weight[0];
      if constexpr (NV == 4) {
        sum = vadd(vadd(sum, weight[1]), vadd(weight[2], weight[3]));
      } else {
        for (int i = 1; i < NV; ++i) sum = vadd(sum, weight[i]);
      }
      vstore(sums + c * kLanes, vadd(vload(sums + c * kLanes), sum));
    }
  }
};

// Bit r of the result: does row i0 + r count?
inline uint64_t rows_that_count(const SummaryParams& sp, const ForwardItem& item) {
  const uint64_t all = low_bits(item.i1 - item.i0);
  if (sp.row_mask == nullptr) return all;
  const int64_t* stride = sp.row_mask_stride;
  return nonzero_bits(sp.row_mask + item.b * stride[0] + item.hq * stride[1] + item.i0 * stride[2], stride[2],
                      item.i1 - item.i0);
}

// Sums over rows for the keys of the item's chunk. row_max and row_sum of all rows are known.
template <class Operands>
inline void key_mass_item_as(const SummaryParams& sp, const KeyMassItem& item, char* memory) {
  const AttentionParams& p = sp.attention;
  const KeyMassScratch scratch = key_mass_scratch<Operands>(sp, item.j1 - item.j0, memory, nullptr);
  memset(scratch.sums, 0, sizeof(float) * static_cast<size_t>((item.j1 - item.j0) * kLanes));
  const int64_t head = item.b * p.Hq + item.hq;
  for (int64_t i0 = 0; i0 < p.Lq; i0 += kBlockRows) {
    const ForwardItem rows{item.b, item.hq, i0, min_i64(p.Lq, i0 + kBlockRows)};
    const uint64_t rows_count = rows_that_count(sp, rows);
    if (rows_count == 0) continue;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t at = head * p.Lq + i0 + r;
      const float l = i0 + r < p.Lq ? static_cast<const float*>(p.row_sum)[at] : 0.0f;
      scratch.base[r] = l == 0.0f ? 0.0f : static_cast<const float*>(p.row_max)[at];
      scratch.inverse_sum[r] = l == 0.0f ? 0.0f : 1.0f / l;
    }
    KeyMass consumer{scratch, item.j0, rows_count};
    walk_scores<Operands>(p, rows, item.j0, item.j1, scratch.scores, consumer);
  }
  float* key_mass = static_cast<float*>(sp.key_mass) + head * p.Lk;
  for (int64_t j = item.j0; j < item.j1; ++j) {
    key_mass[j] = vreduce_add(vload(scratch.sums + (j - item.j0) * kLanes));
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
