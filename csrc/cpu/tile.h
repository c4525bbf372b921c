// What happens to a tile of scores between the two matrix products: masks, bias, softcap, ALiBi, dropout.
//
// A tile holds nk keys by kBlockRows query rows, [key][row], row-contiguous. A mask is one 64-bit word per key, bit r
// for row r, whatever it came from: intervals, a tensor, or both.
#pragma once

#include <string.h>

#include "core/mask.h"
#include "core/philox.h"
#include "core/score.h"
#include "core/sequence.h"
#include "cpu/kernels.h"
#include "cpu/operands.h"
#include "cpu/pack.h"
#include "cpu/vector_math.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Keys of a tile at most. The longer the block, the less often O is rescaled; beyond about 200 nothing was gained, and
// 197, the vision transformers, fit into one. Against 96, forward at L=2048, D=64: float32 87.0% -> 88.2% of the peak,
// bfloat16 79.5% -> 80.3%.
constexpr int64_t kMaxBlockKeys = 204;
// With a mask tensor, key blocks start on multiples of this, so that tiles that are empty in the mask are met whole.
constexpr int64_t kMaskBlockKeys = 64;

// Keys per step over a range of them: even blocks of whole micro-kernel rows rather than full ones and a short rest.
FASTATTN_FN int64_t key_step(const AttentionParams& p, int64_t keys) {
  if (p.mask != nullptr) return kMaskBlockKeys;
  const int64_t blocks = max_i64(1, (keys + kMaxBlockKeys - 1) / kMaxBlockKeys);
  return min_i64(kMaxBlockKeys, round_up((keys + blocks - 1) / blocks, kRowPad));
}

// The blocks of keys that cover a range: apart where all rows see all keys and where they do not, so that few tiles
// need a mask; those that need none begin and end at even keys (arithmetic in pairs). With a mask tensor, blocks lie
// where its empty tiles lie, however the range begins.
class KeyBlocks {
 public:
  FASTATTN_INLINE KeyBlocks(const AttentionParams& p, const TileRange& range) : at_(range.begin) {
    const int64_t full_begin = range.full_begin > range.begin ? round_up(range.full_begin, 2) : range.begin;
    const int64_t full_end = range.full_end < range.end ? range.full_end & ~int64_t{1} : range.end;
    const bool has_full = p.mask == nullptr && full_begin < full_end;
    ends_[0] = has_full ? full_begin : range.end;
    ends_[1] = has_full ? full_end : range.end;
    ends_[2] = range.end;
    for (int i = 0; i < 3; ++i) step_[i] = key_step(p, ends_[i] - (i == 0 ? at_ : ends_[i - 1]));
    is_aligned_ = p.mask != nullptr;
  }
  FASTATTN_INLINE bool next(int64_t* begin, int64_t* end) {
    while (stretch_ < 3 && at_ >= ends_[stretch_]) ++stretch_;
    if (stretch_ == 3) return false;
    *begin = at_;
    const int64_t step = step_[stretch_];
    at_ = min_i64(ends_[stretch_], is_aligned_ ? (at_ / step + 1) * step : at_ + step);
    *end = at_;
    return true;
  }

 private:
  int64_t at_, ends_[3], step_[3];
  int stretch_ = 0;
  bool is_aligned_;
};

// Where a tile lies.
struct Tile {
  int64_t b, hq;
  int64_t i0, rows;  // rows <= kBlockRows
  int64_t j0, nk;    // nk <= kMaxBlockKeys
};

// Keys (or rows) [begin, end) of a tile.
struct TileSpan {
  int64_t begin, end;
};

// The keys of the tile that any of its rows [r, r + n) sees, from an even key on (arithmetic in pairs) and, where any
// is seen and the tile has as many, at least `least` keys (micro-kernels compute whole groups).
FASTATTN_FN TileSpan visible_keys(const MaskGeometry& g, const Tile& t, int64_t r, int64_t n, int64_t least) {
  const int64_t begin = clamp_i64(lo(g, t.i0 + r) - t.j0, 0, t.nk);
  const int64_t end = clamp_i64(hi(g, t.i0 + r + n - 1) - t.j0, 0, t.nk);
  if (begin >= end) return {0, 0};
  const int64_t widened_end = max_i64(end, min_i64(least, t.nk));
  return {min_i64(begin, max_i64(0, widened_end - least)) & ~int64_t{1}, widened_end};
}

// The rows [begin, end) of the tile that see any of its keys [c, c + n).
FASTATTN_FN TileSpan visible_rows(const MaskGeometry& g, const Tile& t, int64_t c, int64_t n) {
  return {clamp_i64(first_row_before_hi(g, t.j0 + c) - t.i0, 0, t.rows),
          clamp_i64(end_row_after_lo(g, t.j0 + c + n - 1) - t.i0, 0, t.rows)};
}

FASTATTN_FN uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Bit t of the result: is from[t * stride] nonzero, for t < n <= 64.
inline uint64_t nonzero_bits(const uint8_t* from, int64_t stride, int64_t n) {
  if (stride == 1 && n == 64) return nonzero_bytes(from);
  uint64_t bits = 0;
  for (int64_t t = 0; t < n; ++t) bits |= uint64_t{from[t * stride] != 0} << t;
  return bits;
}

// Bit c of word r becomes bit r of word c: swaps ever smaller off-diagonal blocks.
inline void transpose_bits(uint64_t (&words)[64]) {
  uint64_t block_mask = 0x00000000FFFFFFFFu;
  for (int width = 32; width != 0; width >>= 1, block_mask ^= block_mask << width) {
    for (int r = 0; r < 64; r = ((r | width) + 1) & ~width) {
      const uint64_t swap = ((words[r] >> width) ^ words[r | width]) & block_mask;
      words[r] ^= swap << width;
      words[r | width] ^= swap;
    }
  }
}

// Ands the mask tensor's part of the tile into `keep`.
inline void and_mask_tensor(const AttentionParams& p, const Tile& t, uint64_t* keep) {
  const int64_t* stride = p.mask_stride;
  const uint8_t* mask = p.mask + t.b * stride[0] + t.hq * stride[1] + t.i0 * stride[2] + t.j0 * stride[3];
  for (int64_t j = 0; j < t.nk; j += 64) {
    const int64_t n = min_i64(64, t.nk - j);
    const uint8_t* columns = mask + j * stride[3];
    if (stride[2] == 0) {
      const uint64_t bits = nonzero_bits(columns, stride[3], n);
      for (int64_t c = 0; c < n; ++c) keep[j + c] &= (bits >> c) & 1 ? ~uint64_t{0} : 0;
      continue;
    }
    uint64_t words[64] = {};
    uint64_t any = 0, all = ~uint64_t{0};
    for (int64_t r = 0; r < t.rows; ++r) {
      words[r] = nonzero_bits(columns + r * stride[2], stride[3], n);
      any |= words[r];
      all &= words[r];
    }
    if (any == 0) {
      memset(keep + j, 0, sizeof(uint64_t) * static_cast<size_t>(n));
    } else if (all != low_bits(n)) {
      transpose_bits(words);
      for (int64_t c = 0; c < n; ++c) keep[j + c] &= words[c];
    }
  }
}

// Says what the tile shows, and fills `keep` (one word per key) when it is partial.
inline TileKind tile_mask(const AttentionParams& p, const MaskGeometry& g, const Tile& t, uint64_t* keep) {
  const TileKind geometry = classify_tile(g, t.i0, t.i0 + t.rows, t.j0, t.j0 + t.nk);
  if (geometry == TileKind::kSkip || (geometry == TileKind::kFull && p.mask == nullptr)) return geometry;
  for (int64_t c = 0; c < t.nk; ++c) {
    const int64_t first = clamp_i64(first_row_before_hi(g, t.j0 + c) - t.i0, 0, t.rows);
    const int64_t end = clamp_i64(end_row_after_lo(g, t.j0 + c) - t.i0, first, t.rows);
    keep[c] = low_bits(end) & ~low_bits(first);
  }
  if (p.mask == nullptr) return TileKind::kPartial;
  and_mask_tensor(p, t, keep);
  uint64_t any = 0, all = ~uint64_t{0};
  for (int64_t c = 0; c < t.nk; ++c) {
    any |= keep[c];
    all &= keep[c];
  }
  const uint64_t rows = low_bits(t.rows);
  return (any & rows) == 0 ? TileKind::kSkip : (all & rows) == rows ? TileKind::kFull : TileKind::kPartial;
}

template <class Element>
inline void fill_bias_tile(const AttentionParams& p, const Tile& t, float* tile) {
  using Raw = typename Element::Raw;
  const int64_t* stride = p.bias_stride;
  const Raw* bias =
      static_cast<const Raw*>(p.bias) + t.b * stride[0] + t.hq * stride[1] + t.i0 * stride[2] + t.j0 * stride[3];
  if (stride[2] == 0) {  // the same for every row
    for (int64_t c = 0; c < t.nk; ++c) {
      const Vf x = vset(vreduce_add(Element::load_first(bias + c * stride[3], 1)));
      for (int64_t r = 0; r < t.rows; r += kLanes) vstore(tile + c * kBlockRows + r, x);
    }
    return;
  }
  if (stride[3] == 1) {
    for (int64_t r0 = 0; r0 < t.rows; r0 += kLanes) {
      for (int64_t c0 = 0; c0 < t.nk; c0 += kLanes) {
        Vf block[kLanes];
        load_tile<Element>(block, bias + r0 * stride[2] + c0, stride[2], t.rows - r0, t.nk - c0);
        vtranspose(block);
        for (int c = 0; c < kLanes && c0 + c < t.nk; ++c) vstore(tile + (c0 + c) * kBlockRows + r0, block[c]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < t.nk; ++c) {
    for (int64_t r0 = 0; r0 < t.rows; r0 += kLanes) {
      Vf x = vzero();
      if (stride[2] == 1) {
        x = Element::load_first(bias + c * stride[3] + r0, t.rows - r0);
      } else {
        float lanes[kLanes] = {};
        for (int64_t r = r0; r < t.rows && r < r0 + kLanes; ++r) {
          lanes[r - r0] = vreduce_add(Element::load_first(bias + r * stride[2] + c * stride[3], 1));
        }
        x = vload(lanes);
      }
      vstore(tile + c * kBlockRows + r0, x);
    }
  }
}

inline void fill_bias_tile(const AttentionParams& p, const Tile& t, float* tile) {
  switch (p.bias_dtype) {
    case DType::kBFloat16:
      return fill_bias_tile<BFloat16>(p, t, tile);
    case DType::kFloat16:
      return fill_bias_tile<Float16>(p, t, tile);
    default:
      return fill_bias_tile<Float32>(p, t, tile);
  }
}

// tile[key][row] = 1 / (1 - dropout_p) where the weight is kept, else 0.
inline void fill_dropout_tile(const AttentionParams& p, const Tile& t, float* tile) {
  if (p.dropout_p >= 1.0) {
    memset(tile, 0, sizeof(float) * static_cast<size_t>(t.nk * kBlockRows));
    return;
  }
  const Vi threshold = viset(dropout_threshold(p.dropout_p));
  const Vf kept = vset(static_cast<float>(1.0 / (1.0 - p.dropout_p)));
  const uint32_t bh = static_cast<uint32_t>(dropout_head(p, t.b, t.hq));
  for (int64_t r = 0; r < t.rows; r += kLanes) {
    const Vi rows = viadd(viota(), viset(static_cast<uint32_t>(t.i0 + r)));
    for (int64_t quad = t.j0 & ~int64_t{3}; quad < t.j0 + t.nk; quad += 4) {
      Vi words[4];
      vphilox(p.seed, static_cast<uint32_t>(quad >> 2), rows, bh, static_cast<uint32_t>(p.offset), words);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t c = quad + w - t.j0;
        if (c < 0 || c >= t.nk) continue;
        vstore(tile + c * kBlockRows + r, vselect(vigreater_equal(words[w], threshold), kept, vzero()));
      }
    }
  }
}

// Everything that turns the products S = K Q^T of a tile into scores, apart from a scale folded into Q.
struct ScoreModifiers {
  float scale = 1.0f;  // still to be applied
  float softcap = 0.0f;
  const float* bias_tile = nullptr;  // [nk][kBlockRows]
  float alibi_slope = 0.0f;
  int64_t alibi_diagonal = 0;      // row r of the tile sits at distance |r + alibi_diagonal - c| from key c
  const uint64_t* keep = nullptr;  // null: everything is visible
  float* tanh_tile = nullptr;      // [nk][kBlockRows], receives tanh(s / softcap) for the backward pass
};

FASTATTN_FN bool has_modifiers(const AttentionParams& p) {
  return p.softcap != 0.0 || p.bias != nullptr || p.alibi_slopes != nullptr;
}

// The modifiers of a tile; fills the bias tile.
inline ScoreModifiers score_modifiers(const AttentionParams& p, const MaskGeometry& g, const Tile& t, float scale,
                                      const uint64_t* keep, float* bias_tile) {
  ScoreModifiers m;
  m.scale = scale;
  m.softcap = static_cast<float>(p.softcap);
  if (p.bias != nullptr) {
    fill_bias_tile(p, t, bias_tile);
    m.bias_tile = bias_tile;
  }
  if (p.alibi_slopes != nullptr) {
    m.alibi_slope = static_cast<const float*>(p.alibi_slopes)[t.b * p.alibi_stride[0] + t.hq * p.alibi_stride[1]];
    m.alibi_diagonal = t.i0 + g.Lk - g.Lq - t.j0;
  }
  m.keep = keep;
  return m;
}

// Applies the modifiers to keys [first_key, first_key + nk) of NV vectors of rows from vector v0 on, whose scores lie
// at s, s_stride floats a key, and raises lane_max (NV vectors) to their maximum.
template <int NV>
inline void modify_scores(const ScoreModifiers& m, float* s, int64_t s_stride, int64_t first_key, int64_t nk, int v0,
                          Vf* lane_max) {
  const Vf scale = vset(m.scale), cap = vset(m.softcap), slope = vset(m.alibi_slope);
  const Vf inverse_cap = vset(m.softcap != 0.0f ? 1.0f / m.softcap : 0.0f);
  const Vf minus_infinity = vset(-__builtin_inff());
  for (int64_t c = first_key; c < first_key + nk; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = c * kBlockRows + (v0 + v) * kLanes;
      float* score = s + (c - first_key) * s_stride + v * kLanes;
      Vf x = vmul(vload(score), scale);
      if (m.softcap != 0.0f) {
        const Vf t = vtanh(vmul(x, inverse_cap));
        if (m.tanh_tile != nullptr) vstore(m.tanh_tile + at, t);
        x = vmul(t, cap);
      }
      if (m.bias_tile != nullptr) x = vadd(x, vload(m.bias_tile + at));
      if (m.alibi_slope != 0.0f) {
        const int64_t first = m.alibi_diagonal + (v0 + v) * kLanes - c;
        const Vf distance = vabs(vfrom_int(viadd(viota(), viset(static_cast<uint32_t>(first)))));
        x = vsub(x, vmul(slope, distance));
      }
      if (m.keep != nullptr) x = vselect(vmask_from_bits(m.keep[c] >> ((v0 + v) * kLanes)), x, minus_infinity);
      vstore(score, x);
      lane_max[v] = vmax(lane_max[v], x);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
