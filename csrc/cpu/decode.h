// Few query rows over many keys (decoding), forward: o = softmax(scores) v as fast as K and V can be read.
//
// The rows of an item are those of all its query heads, which share one key head: what is read of K and V is read once
// for all of them. It takes the keys in blocks, whose scores, [row][key], stay in the first-level cache, and whose
// products are those of decode_products.h.
//
// Every key has a pointer to its row, so that rows a stride apart, rows in pages (core/sequence.h) and a row of zeros
// in place of a block's missing last keys are all the same to the products. While they compute, the rows of the next
// block are fetched, so that memory never waits for arithmetic: against leaving that to the processor, 1.5 to 2.5 times
// the rate (Zen 4, keys and values that no cache holds).
//
// Online softmax over the blocks as in forward.h. An item may be a part of the keys: it then leaves its sums, and
// merge_rows adds up the parts. Handles everything in core/params.h but dropout, additive scores and float64.
#pragma once

#include "core/sequence.h"
#include "cpu/decode_products.h"
#include "cpu/row_statistics.h"
#include "cpu/scores.h"
#include "cpu/small.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

struct DecodeBlock {
  int64_t j0, nk;
  const char* k[kDecodeKeys];
  const char* v[kDecodeKeys];
  // Of an int8 cache; with the largest size of v's, and 0, or NaN where one of them is infinite or NaN.
  float k_scale[kDecodeKeys], v_scale[kDecodeKeys];
  float v_scale_top, v_scale_check;
};

// One worker's memory.
struct DecodeScratch {
  float* q;  // [rows][query_floats]: in float arithmetic times scale
  float* s;  // [rows][kDecodeKeys] scores, then weights; those of pairs in the first half of a row
  float* o;  // [rows][padded Dv], not yet divided by the row sums
  RowScratch rows;
  float* block_max;  // [rows]
  float* sinks;      // [rows]
  // Where queries and weights are quantised, [rows]: scale times what a quantum of q is, what a quantum of the block's
  // weights times v_scale is, and how many of them make 1.
  float* q_quantum;
  float* w_quantum;
  float* w_quanta;
  uint64_t* keep;      // [rows][kKeyWords], bit c for key c of the block
  char* zeros;         // a row of zeros
  DecodeBlock* block;  // [2]: the one at hand, and the next
};

// Floats of a row of scratch.
FASTATTN_FN int64_t decode_width(int64_t columns) { return round_up(columns, 2 * kLanes); }

inline DecodeScratch decode_scratch(const AttentionParams& p, char* memory, size_t* bytes) {
  Arena arena{memory};
  DecodeScratch s;
  s.q = arena.take<float>((kBlockRows + 1) * decode_width(p.D));  // rows are packed beyond their end
  s.s = arena.take<float>(kBlockRows * kDecodeKeys);
  s.o = arena.take<float>(kBlockRows * decode_width(p.Dv));
  s.rows = row_scratch(&arena);
  s.block_max = arena.take<float>(kBlockRows);
  s.sinks = arena.take<float>(kBlockRows);
  s.q_quantum = arena.take<float>(kBlockRows);
  s.w_quantum = arena.take<float>(kBlockRows);
  s.w_quanta = arena.take<float>(kBlockRows);
  s.keep = arena.take<uint64_t>(kBlockRows * kKeyWords);
  s.zeros = arena.take<char>(4 * decode_width(max_i64(p.D, p.Dv)));
  s.block = arena.take<DecodeBlock>(2);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

// Where row r of an item lies.
struct DecodeRow {
  int64_t hq, i;
};
FASTATTN_FN DecodeRow decode_row(const AttentionParams& p, const DecodeItem& item, int64_t r) {
  return {item.hq0 + r / p.Lq, r % p.Lq};
}

// Fetches a line of each page that rows lie in. Translating an address that no TLB holds takes longer than instructions
// can be executed out of order, but several are translated at the same time.
FASTATTN_FN void touch_pages(const void* rows, int64_t stride_bytes, int64_t count) {
  constexpr int64_t kPage = 4096;
  const int64_t distance = stride_bytes < 0 ? -stride_bytes : stride_bytes;
  const int64_t step = distance >= kPage || distance == 0 ? 1 : kPage / distance;
  for (int64_t t = 0; t < count; t += step) {
    __builtin_prefetch(static_cast<const char*>(rows) + t * stride_bytes, 0, 2);
  }
}

// Keys [j0, j0 + nk), and zeros for the rest of the block.
template <class Keys>
inline void find_rows(const AttentionParams& p, const DecodeItem& item, int64_t j0, int64_t nk, const char* zeros,
                      DecodeBlock* block) {
  using Raw = typename Keys::Raw;
  const int64_t hkv = item.hq0 / (p.Hq / p.Hkv);
  block->j0 = j0;
  block->nk = nk;
  for (int64_t c = 0; c < nk;) {
    const KeyRun run = key_run(p, item.b, j0 + c, j0 + nk);
    const Raw* k = row_at<const Raw>(p.k, p.k_stride, run.batch, hkv, run.row);
    const Raw* v = row_at<const Raw>(p.v, p.v_stride, run.batch, hkv, run.row);
    for (int64_t t = 0; t < run.count; ++t) {
      block->k[c + t] = reinterpret_cast<const char*>(k + t * p.k_stride[2]);
      block->v[c + t] = reinterpret_cast<const char*>(v + t * p.v_stride[2]);
    }
    touch_pages(k, p.k_stride[2] * static_cast<int64_t>(sizeof(Raw)), run.count);
    touch_pages(v, p.v_stride[2] * static_cast<int64_t>(sizeof(Raw)), run.count);
    if constexpr (Keys::kScaled) {
      const float* k_scale = row_at<const float>(p.k_scale, p.k_scale_stride, run.batch, hkv, run.row);
      const float* v_scale = row_at<const float>(p.v_scale, p.v_scale_stride, run.batch, hkv, run.row);
      for (int64_t t = 0; t < run.count; ++t) {
        block->k_scale[c + t] = k_scale[t * p.k_scale_stride[2]];
        block->v_scale[c + t] = v_scale[t * p.v_scale_stride[2]];
      }
    }
    c += run.count;
  }
  for (int64_t c = nk; c < Keys::kBlockKeys; ++c) {
    block->k[c] = block->v[c] = zeros;
    if constexpr (Keys::kScaled) block->k_scale[c] = block->v_scale[c] = 0.0f;
  }
  if constexpr (Keys::kQuantises) {
    Vf top = vzero(), check = vzero();
    for (int64_t c = 0; c < nk; c += kLanes) {
      const Vf x = vload(block->v_scale + c);
      top = vmax(top, vabs(x));
      check = vfma(x, vzero(), check);
    }
    block->v_scale_top = vreduce_max(top);
    block->v_scale_check = vreduce_add(check);
  }
}

// ---- S = Q K^T -----------------------------------------------------------------------------------------------------

template <class Keys, class Element>
inline void pack_queries(const AttentionParams& p, const DecodeItem& item, int64_t rows, const DecodeScratch& scratch) {
  using Raw = typename Element::Raw;
  const int64_t q_stride = query_floats<Keys>(p.D), width = decode_width(p.D);
  const Vf scale = vset(Keys::kPairs ? 1.0f : static_cast<float>(p.scale));
  for (int64_t r = 0; r < rows; ++r) {
    const DecodeRow at = decode_row(p, item, r);
    const Raw* q = row_at<const Raw>(p.q, p.q_stride, item.b, at.hq, at.i);
    float* to = scratch.q + r * q_stride;  // of pairs the next row is half of this one's floats away, and comes later
    if constexpr (Keys::kPairs && !Keys::kQuantises) {
      memset(to, 0, sizeof(float) * static_cast<size_t>(q_stride));
      memcpy(to, q, sizeof(Raw) * static_cast<size_t>(p.D));
    } else {
      for (int64_t d = 0; d < width; d += kLanes) {
        vstore(to + d, d < p.D ? vmul(scale, Element::load_first(q + d, p.D - d)) : vzero());
      }
    }
#if FASTATTN_I16_DOT
    if constexpr (Keys::kQuantises) {
      scratch.q_quantum[r] = static_cast<float>(p.scale) * quantise(to, width, Keys::quanta(p.D));
    }
#endif
  }
  const int64_t padding = round_up(rows, kRowTile) - rows;
  memset(scratch.q + rows * q_stride, 0, sizeof(float) * static_cast<size_t>(padding * q_stride));
}

// s[row][key] of R rows.
template <class Keys, int R>
inline void score_rows_of_block(const AttentionParams& p, const DecodeBlock& block, const DecodeBlock* next, int64_t r,
                                const DecodeScratch& scratch) {
  constexpr int64_t NK = kLanes / R;
  const int64_t row_bytes = p.D * static_cast<int64_t>(sizeof(typename Keys::Raw));
  const float* q = scratch.q + r * query_floats<Keys>(p.D);
  for (int64_t c = 0; c < block.nk; c += NK) {
    RowFetch fetch(next != nullptr ? next->k + c : block.k, next != nullptr ? NK : 0, row_bytes);
    score_keys<Keys, R>(block.k + c, q, p.D, scratch.s + r * kDecodeKeys + c, &fetch);
    fetch.rest();
  }
}

// Calls body.template operator()<R>(r) for tiles of R rows from r on: of 4, at last of 1 or 2 where that is enough.
template <class Body>
FASTATTN_FN void for_each_row_tile(int64_t rows, const Body& body) {
  for (int64_t r = 0; r < rows; r += kRowTile) {
    if (rows - r == 1) {
      body.template operator()<1>(r);
    } else if (rows - r == 2) {
      body.template operator()<2>(r);
    } else {
      body.template operator()<4>(r);
    }
  }
}

// s[row][key] of a block; meanwhile the rows of K of the next one, if any, are fetched.
template <class Keys>
inline void score_block(const AttentionParams& p, const DecodeBlock& block, const DecodeBlock* next, int64_t rows,
                        const DecodeScratch& scratch) {
  for_each_row_tile(
      rows, [&]<int R>(int64_t r) { score_rows_of_block<Keys, R>(p, block, r == 0 ? next : nullptr, r, scratch); });
}

// ---- Masks, modifiers, softmax -------------------------------------------------------------------------------------

// Fills scratch.keep where rows do not see all keys of the block.
inline TileKind block_mask(const AttentionParams& p, const MaskGeometry& g, const DecodeItem& item,
                           const DecodeBlock& block, int64_t rows, uint64_t* keep) {
  const TileKind geometry = classify_tile(g, 0, p.Lq, block.j0, block.j0 + block.nk);
  if (geometry == TileKind::kSkip || (geometry == TileKind::kFull && p.mask == nullptr)) return geometry;
  bool any = false, all = true;
  for (int64_t r = 0; r < rows; ++r) {
    const DecodeRow at = decode_row(p, item, r);
    const int64_t begin = lo(g, at.i) - block.j0, end = hi(g, at.i) - block.j0;
    for (int64_t w = 0; w < kKeyWords; ++w) {
      const int64_t n = clamp_i64(block.nk - w * 64, 0, 64);
      const int64_t last = clamp_i64(end - w * 64, 0, n);
      uint64_t bits = low_bits(last) & ~low_bits(clamp_i64(begin - w * 64, 0, last));
      if (bits != 0 && p.mask != nullptr) {
        const int64_t* stride = p.mask_stride;
        bits &= nonzero_bits(
            p.mask + item.b * stride[0] + at.hq * stride[1] + at.i * stride[2] + (block.j0 + w * 64) * stride[3],
            stride[3], n);
      }
      keep[r * kKeyWords + w] = bits;
      any = any || bits != 0;
      all = all && bits == low_bits(n);
    }
  }
  return !any ? TileKind::kSkip : all ? TileKind::kFull : TileKind::kPartial;
}

template <class Element>
FASTATTN_FN Vf load_bias_keys(const void* bias, int64_t at, int64_t stride, int64_t n) {
  const auto* from = static_cast<const typename Element::Raw*>(bias) + at;
  if (stride == 1) return Element::load_first(from, n);
  float lanes[kLanes] = {};
  for (int64_t l = 0; l < kLanes && l < n; ++l) lanes[l] = load_scalar<Element>(from, l * stride);
  return vload(lanes);
}

// The biases of n keys of a row, from element `at` of the tensor on.
inline Vf load_bias_keys(const AttentionParams& p, int64_t at, int64_t n) {
  switch (p.bias_dtype) {
    case DType::kBFloat16:
      return load_bias_keys<BFloat16>(p.bias, at, p.bias_stride[3], n);
    case DType::kFloat16:
      return load_bias_keys<Float16>(p.bias, at, p.bias_stride[3], n);
    default:
      return load_bias_keys<Float32>(p.bias, at, p.bias_stride[3], n);
  }
}

// Turns the products of row r, times `scale`, into scores; -inf from key nk on.
inline void modify_row(const AttentionParams& p, const MaskGeometry& g, const DecodeItem& item,
                       const DecodeBlock& block, int64_t r, float product_factor, const uint64_t* keep, float* s) {
  const DecodeRow row = decode_row(p, item, r);
  const Vf scale = vset(product_factor), cap = vset(static_cast<float>(p.softcap));
  const Vf inverse_cap = vset(p.softcap != 0.0 ? 1.0f / static_cast<float>(p.softcap) : 0.0f);
  float slope = 0.0f;
  if (p.alibi_slopes != nullptr) {
    slope = static_cast<const float*>(p.alibi_slopes)[item.b * p.alibi_stride[0] + row.hq * p.alibi_stride[1]];
  }
  const int64_t bias_row = item.b * p.bias_stride[0] + row.hq * p.bias_stride[1] + row.i * p.bias_stride[2];
  const int64_t diagonal = row.i + g.Lk - g.Lq;
  for (int64_t c = 0; c < block.nk; c += kLanes) {
    const int64_t j = block.j0 + c, n = min_i64(kLanes, block.nk - c);
    Vf x = vmul(vload(s + c), scale);
    if (p.softcap != 0.0) x = vmul(vtanh(vmul(x, inverse_cap)), cap);
    if (p.bias != nullptr) x = vadd(x, load_bias_keys(p, bias_row + j * p.bias_stride[3], n));
    if (slope != 0.0f) {
      const Vf distance = vabs(vfrom_int(visub(viset(static_cast<uint32_t>(diagonal - j)), viota())));
      x = vsub(x, vmul(vset(slope), distance));
    }
    const uint64_t seen = keep != nullptr ? keep[c / 64] >> c % 64 : low_bits(n);
    vstore(s + c, vselect(vmask_from_bits(seen), x, vset(-__builtin_inff())));
  }
}

// scores -> weights exp(score - m), the rows' new maxima and sums, and in rows.rescale what the values summed so far
// are to be multiplied by.
template <class Keys>
inline void weigh_block(const AttentionParams& p, const MaskGeometry& g, const DecodeItem& item,
                        const DecodeBlock& block, TileKind kind, int64_t rows, const DecodeScratch& scratch) {
  const float factor = Keys::kPairs && !Keys::kQuantises ? static_cast<float>(p.scale) : 1.0f;
  // Lanes beyond the block's last key hold anything: they are hidden as keys are.
  const bool are_modified = has_modifiers(p) || factor <= 0.0f || kind == TileKind::kPartial || block.nk % kLanes != 0;
  const float rest = are_modified ? 1.0f : factor;  // still to be applied, and positive
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scratch.s + r * kDecodeKeys;
    Vf top = vset(-__builtin_inff());
    if constexpr (Keys::kScaled) {
      const Vf quantum = vset(Keys::kQuantises ? scratch.q_quantum[r] : 1.0f);
      for (int64_t c = 0; c < block.nk; c += kLanes) {
        const Vf x = vmul(vload(s + c), vmul(quantum, vload(block.k_scale + c)));
        vstore(s + c, x);
        top = vmax(top, x);
      }
    }
    if (are_modified) {
      const uint64_t* keep = kind == TileKind::kPartial ? scratch.keep + r * kKeyWords : nullptr;
      modify_row(p, g, item, block, r, factor, keep, s);
    }
    if (are_modified || !Keys::kScaled) {
      top = vset(-__builtin_inff());
      for (int64_t c = 0; c < block.nk; c += kLanes) top = vmax(top, vload(s + c));
    }
    scratch.block_max[r] = vreduce_max(top) * rest;
  }
  const Vf minus_infinity = vset(-__builtin_inff());
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vf old_max = vload(scratch.rows.row_max + r);
    const Vf new_max = vmax(old_max, vload(scratch.block_max + r));
    // A row that has seen nothing weighs against 0 instead of -inf, since -inf - -inf is NaN.
    const Vf base = vselect(vequal(new_max, minus_infinity), vzero(), new_max);
    vstore(scratch.rows.row_max + r, new_max);
    vstore(scratch.rows.rescale + r, vexp(vsub(old_max, base)));
    if constexpr (Keys::kQuantises) {
      const Vf largest = vmul(vexp(vsub(vload(scratch.block_max + r), base)), vset(block.v_scale_top));
      vstore(scratch.w_quanta + r, quanta_of_one(largest, kWeightQuanta));
      vstore(scratch.w_quantum + r, vfma(largest, vset(1.0f / kWeightQuanta), vset(block.v_scale_check)));
    }
    vstore(scratch.block_max + r, base);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scratch.s + r * kDecodeKeys;
    const Vf base = vset(scratch.block_max[r]);
    Vf sum = vzero();
    if constexpr (!Keys::kPairs) {
      for (int64_t c = 0; c < block.nk; c += kLanes) {
        const Vf w = vexp(vsub(vload(s + c), base));
        sum = vadd(sum, w);
        vstore(s + c, Keys::kScaled ? vmul(w, vload(block.v_scale + c)) : w);
      }
    }
#if FASTATTN_I16_DOT
    else if constexpr (Keys::kQuantises) {
      const Vf quanta = vset(scratch.w_quanta[r]), log2e = vset(kLog2e);
      for (int64_t c = 0; c < block.nk; c += kLanes) {
        const Vf w = vexp2<Keys::kExp2Degree>(vmul(vsub(vload(s + c), base), log2e));
        sum = vadd(sum, w);
        vistore_shorts(s + c / 2, vround(vmul(w, vmul(quanta, vload(block.v_scale + c)))));
      }
    }
#endif
#if FASTATTN_BF16_DOT
    else {
      // Large and equal scores (a finite mask) must be subtracted first; plain products are of ordinary size.
      const Vf log2e = vset(kLog2e), shift = vmul(base, vset(-kLog2e)), scale_log2e = vset(rest * kLog2e);
      for (int64_t c = 0; c < block.nk; c += 2 * kLanes) {
        Vf w[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          w[h] = vzero();
          if (c + h * kLanes >= block.nk) continue;
          const Vf x = vload(s + c + h * kLanes);
          w[h] = vexp2<Keys::kExp2Degree>(are_modified ? vmul(vsub(x, base), log2e) : vfma(x, scale_log2e, shift));
          sum = vadd(sum, w[h]);
        }
        vistore(reinterpret_cast<uint32_t*>(s + c / 2), vnarrow(w[0], w[1]));
      }
    }
#endif
    scratch.rows.row_sum[r] = scratch.rows.row_sum[r] * scratch.rows.rescale[r] + vreduce_add(sum);
  }
}

// ---- O = P V -------------------------------------------------------------------------------------------------------

template <class Keys, int RT>
inline void sum_values_of_rows(const AttentionParams& p, const DecodeBlock& block, const DecodeBlock* next, int64_t r,
                               const DecodeScratch& scratch) {
  // As many accumulators as registers allow; the fewer the rows, the more of a row of V is taken at a time.
  constexpr int NV = kPanelVectors == 4 ? (RT == 4 ? 4 : 8) : RT == 4 ? 2 : 4;
  constexpr int kTailVectors = Keys::kPairs ? 2 : 1;
  const float* w = scratch.s + r * kDecodeKeys;
  const float* rescale = scratch.rows.rescale + r;
  const float* quantum = scratch.w_quantum + r;
  const int64_t width = decode_width(p.Dv);
  float* o = scratch.o + r * width;
  RowFetch fetch(next != nullptr ? next->v : block.v, next != nullptr ? next->nk : 0,
                 p.Dv * static_cast<int64_t>(sizeof(typename Keys::Raw)));
  int64_t d = 0;
  for (; d + NV * kLanes <= p.Dv; d += NV * kLanes) {
    sum_values<Keys, RT, NV, false>(w, block.v, block.nk, d, p.Dv, rescale, quantum, o, width, &fetch);
  }
  for (; d < p.Dv; d += kTailVectors * kLanes) {
    sum_values<Keys, RT, kTailVectors, true>(w, block.v, block.nk, d, p.Dv, rescale, quantum, o, width, &fetch);
  }
  fetch.rest();
}

template <class Keys>
inline void sum_block(const AttentionParams& p, const DecodeBlock& block, const DecodeBlock* next, int64_t rows,
                      const DecodeScratch& scratch) {
  for_each_row_tile(
      rows, [&]<int R>(int64_t r) { sum_values_of_rows<Keys, R>(p, block, r == 0 ? next : nullptr, r, scratch); });
}

// ---- The whole -----------------------------------------------------------------------------------------------------

// Rounds a row of o, times factor.
inline void write_row(const AttentionParams& p, int64_t b, int64_t hq, int64_t i, const float* row, float factor) {
  const auto write = [&]<class Element>() {
    auto* to = row_at<typename Element::Raw>(p.o, p.o_stride, b, hq, i);
    for (int64_t d = 0; d < p.Dv; d += kLanes) {
      Element::store_first(to + d, vmul(vload(row + d), vset(factor)), p.Dv - d);
    }
  };
  switch (p.dtype) {
    case DType::kBFloat16:
      return write.template operator()<BFloat16>();
    case DType::kFloat16:
      return write.template operator()<Float16>();
    default:
      return write.template operator()<Float32>();
  }
}

template <class Keys>
inline void decode_item_as(const AttentionParams& p, const DecodeItem& item, char* memory) {
  using Raw = typename Keys::Raw;
  const DecodeScratch scratch = decode_scratch(p, memory, nullptr);
  const MaskGeometry g = mask_geometry(p, item.b);
  const TileRange seen = clipped(key_range(g, 0, p.Lq), item.j0, item.j1);
  const int64_t rows = (item.hq1 - item.hq0) * p.Lq, width = decode_width(p.Dv);
  memset(scratch.o, 0, sizeof(float) * static_cast<size_t>(round_up(rows, kRowTile) * width));
  clear_rows(scratch.rows);
  if (seen.begin < seen.end) {
    memset(scratch.zeros, 0, static_cast<size_t>(4 * decode_width(max_i64(p.D, p.Dv))));
    switch (p.dtype) {
      case DType::kBFloat16:
        pack_queries<Keys, BFloat16>(p, item, rows, scratch);
        break;
      case DType::kFloat16:
        pack_queries<Keys, Float16>(p, item, rows, scratch);
        break;
      default:
        pack_queries<Keys, Float32>(p, item, rows, scratch);
        break;
    }
    DecodeBlock* block = &scratch.block[0];
    DecodeBlock* next = &scratch.block[1];
    find_rows<Keys>(p, item, seen.begin, min_i64(Keys::kBlockKeys, seen.end - seen.begin), scratch.zeros, block);
    RowFetch(block->k, block->nk, p.D * static_cast<int64_t>(sizeof(Raw))).rest();
    RowFetch(block->v, block->nk, p.Dv * static_cast<int64_t>(sizeof(Raw))).rest();
    for (int64_t j = seen.begin; j < seen.end; j += Keys::kBlockKeys) {
      const int64_t keys_left = seen.end - (j + Keys::kBlockKeys);
      if (keys_left > 0) {
        find_rows<Keys>(p, item, j + Keys::kBlockKeys, min_i64(Keys::kBlockKeys, keys_left), scratch.zeros, next);
      }
      const TileKind kind = block_mask(p, g, item, *block, rows, scratch.keep);
      if (kind != TileKind::kSkip) {
        const DecodeBlock* fetched = keys_left > 0 ? next : nullptr;
        score_block<Keys>(p, *block, fetched, rows, scratch);
        weigh_block<Keys>(p, g, item, *block, kind, rows, scratch);
        sum_block<Keys>(p, *block, fetched, rows, scratch);
      }
      DecodeBlock* done = block;
      block = next;
      next = done;
    }
  }
  if (item.partial != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      const DecodeRow at = decode_row(p, item, r);
      float* to = partial_row(p, item.partial, at.hq, at.i);
      memcpy(to, scratch.o + r * width, sizeof(float) * static_cast<size_t>(p.Dv));
      partial_state(p, to)[0] = scratch.rows.row_max[r];
      partial_state(p, to)[1] = scratch.rows.row_sum[r];
    }
    return;
  }
  if (p.sinks != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      scratch.sinks[r] = static_cast<const float*>(p.sinks)[decode_row(p, item, r).hq];
    }
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vf sink = vload(scratch.sinks + r);
    close_rows(scratch.rows, r, 1.0f, p.sinks != nullptr ? &sink : nullptr);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const DecodeRow at = decode_row(p, item, r);
    write_row(p, item.b, at.hq, at.i, scratch.o + r * width, scratch.rows.rescale[r]);
    write_row_statistics(p, item.b, at.hq, at.i, scratch.rows.row_max[r], scratch.rows.row_sum[r]);
  }
}

// Rows [i0, i1) of one (b, hq), from what parts of the keys made of them: as softmax_merge of core/softmax.h, in the
// order of the parts.
inline void merge_rows(const AttentionParams& p, const ForwardItem& item, float* first_part, int64_t parts,
                       int64_t part_floats) {
  const float minus_infinity = -__builtin_inff();
  float state[3][kLanes];
  const RowScratch row{state[0], state[1], state[2]};
  for (int64_t i = item.i0; i < item.i1; ++i) {
    float* first = partial_row(p, first_part, item.hq, i);
    float m = minus_infinity;
    for (int64_t c = 0; c < parts; ++c) {
      const float part_max = partial_state(p, first + c * part_floats)[0];
      m = m > part_max ? m : part_max;
    }
    const float base = m == minus_infinity ? 0.0f : m;
    float l = 0.0f;
    for (int64_t c = 0; c < parts; ++c) {
      float* part = partial_state(p, first + c * part_floats);
      vstore(row.rescale, vexp(vset(part[0] - base)));
      part[2] = row.rescale[0];
      l += part[1] * part[2];
    }
    vstore(row.row_max, vset(m));
    vstore(row.row_sum, vset(l));
    const Vf sink = vset(p.sinks != nullptr ? static_cast<const float*>(p.sinks)[item.hq] : 0.0f);
    close_rows(row, 0, p.dropout_p < 1.0 ? 1.0f : 0.0f, p.sinks != nullptr ? &sink : nullptr);
    for (int64_t d = 0; d < p.Dv; d += kLanes) {
      Vf sum = vzero();
      for (int64_t c = 0; c < parts; ++c) {
        float* part = first + c * part_floats;
        sum = vfma(vload(part + d), vset(partial_state(p, part)[2]), sum);
      }
      vstore(first + d, sum);  // of a row's last vector the lanes beyond Dv are nobody's
    }
    write_row(p, item.b, item.hq, i, first, row.rescale[0]);
    write_row_statistics(p, item.b, item.hq, i, row.row_max[0], row.row_sum[0]);
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
