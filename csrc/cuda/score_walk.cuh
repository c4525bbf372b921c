// Walks over the scores of attention that meet no values: what hard attention (hard_*.cuh) and the summary of attention
// (summary.cuh) have in common. A walk computes one tile of products q . k after the other, with tensor cores, and
// hands each to a function of the kernel's own, `step`.
//
//   RowWalk   one CTA = `resident` query rows of one (batch, query head); keys pass by, in ascending order: among equal
//             scores the first one met is that of the lowest key. Tiles are [query][key].
//   KeyWalk   one CTA = `resident` keys of one batch, and of one query head or of all that share a key head, one after
//             the other; rows pass by, in ascending order, each with 16 bytes of what a pass before has left of it.
//             Tiles are [key][query].
//
// A warp owns 16 rows of the resident operand: it shares none with another, and whatever it sums or compares along the
// other dimension stays within its lanes. The operand that passes by has two tiles, so that the next one arrives while
// this one is used: one barrier a tile.
//
// Every score is rounded step by step, and a transposed tile adds its products in the same order (gemm.cuh), so that
// all passes agree on a score to the bit.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/rows.cuh"
#include "cuda/score.cuh"
#include "cuda/walk_plan.h"

namespace fastattn::cuda {

struct WalkParams {
  AttentionParams attention;
  ScoreConstants constants;
  int row_blocks = 1, key_blocks = 1;
  int splits = 1;
  bool is_aligned_q = false, is_aligned_k = false;
};

// A product becomes a score; -inf for a key that the mask hides. The caller has left out keys that the interval hides,
// which may not exist. kAllModifiers: false where there is nothing but scale and mask.
template <bool kAllModifiers>
FASTATTN_DEVICE float score_of(const WalkParams& p, const MaskGeometry& g, float product, int b, int h, int i, int j) {
  if constexpr (kAllModifiers) {
    return modified(p.attention, g, capped(p.constants, product).value, b, h, i, j);
  } else {
    const AttentionParams& a = p.attention;
    const int64_t* stride = a.mask_stride;
    if (a.mask && !a.mask[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]]) return -kInfinity;
    return multiply(p.constants.scale, product);
  }
}

// exp(x - m), where m is at least x.
FASTATTN_DEVICE float weight_below(float x, float m) { return exp2_approx((x - m) * kLog2E); }

// kParts: CTAs that share a tile of rows, each for a part of what comes of it.
template <DType kType, int kDim, bool kAllModifiers, int kParts = 1>
struct RowWalk {
  static constexpr WalkTiles kTiles = walk_tiles(kType, kDim);
  static constexpr int kBlockM = kTiles.resident, kBlockN = kTiles.streamed, kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kElementBytes<kType>;
  using TileQ = Tile<kType, kBlockM, kDim>;
  using TileK = Tile<kType, kBlockN, kDim>;
  static constexpr int kSharedBytes = TileQ::kBytes + 2 * TileK::kBytes;
  static constexpr int kN = kBlockN / 8;
  static_assert(kBlockM == 16 * kWarps && kBlockN % 16 == 0);
  static_assert(kSharedBytes == walk_shared_bytes(kType, kDim, kTiles));

  // Element [0][tile][e] is row lane_row() + 8 (e / 2), key 8 tile + 2 t + e % 2; t = lane % 4.
  using Scores = float[1][kN][4];

  // Where a CTA works.
  struct Place {
    int b, h, i0, rows, split, part;
  };
  FASTATTN_DEVICE Place place(const WalkParams& p, uint32_t cta_index) {
    // Tiles of one (batch, head) are neighbours, so that its keys stay in L2; those with the most keys start first.
    int cta = static_cast<int>(cta_index);
    const int part = cta % kParts;
    cta /= kParts;
    const int i0 = (p.row_blocks - 1 - cta % p.row_blocks) * kBlockM;
    cta /= p.row_blocks;
    const int split = cta % p.splits, bh = cta / p.splits;
    const int Hq = static_cast<int>(p.attention.Hq), left = static_cast<int>(p.attention.Lq) - i0;
    return {bh / Hq, bh % Hq, i0, left < kBlockM ? left : kBlockM, split, part};
  }
  // Computed again wherever it is needed: kept, it would take registers throughout the loop.
  FASTATTN_DEVICE Place place_again(const WalkParams& p) {
    return place(p, opaque(static_cast<uint32_t>(block_index())));
  }

  FASTATTN_DEVICE int warp_row() { return warp_index() * 16; }  // of the tile's rows, the first of this warp's
  // Of the tile's rows, the first of this lane's two; the other one is 8 further.
  FASTATTN_DEVICE int lane_row() { return warp_row() + (lane_index() >> 2); }

  // step(s, j0, k_tile): scores of keys j0 on, -inf for hidden ones, and the keys themselves. It comes to all threads
  // alike, and may take q's tile afterwards.
  template <class Step>
  FASTATTN_DEVICE void run(const WalkParams& p, Step step) {
    const AttentionParams& a = p.attention;
    const Place at = place(p, static_cast<uint32_t>(block_index()));
    const MaskGeometry geometry = mask_geometry(a, at.b);
    const TileRange keys = key_range(geometry, at.i0, at.i0 + at.rows);
    const int full_begin = static_cast<int>(keys.full_begin), full_end = static_cast<int>(keys.full_end);
    const auto [n_begin, n_end] = tiles_of_split<kBlockN>(keys, at.split, p.splits);

    const SharedAddress q_tile = shared_base(), k_tiles = q_tile + TileQ::kBytes;
    const int key_count = static_cast<int>(geometry.Lk);
    const int b = at.b, h = at.h;
    const auto load_keys = [&](int n) {
      const int hkv = static_cast<int>(opaque(static_cast<uint32_t>(h))) / static_cast<int>(a.Hq / a.Hkv);
      const auto k_rows = RowPointer<kBytes>::make(a.k, a.k_stride, b, hkv);
      load_tile<TileK, kThreads>(k_tiles + n % 2 * TileK::kBytes, k_rows.at(n * kBlockN), k_rows.row_bytes,
                                 key_count - n * kBlockN, static_cast<int>(a.D), p.is_aligned_k);
      cp_async_commit();
    };
    if (n_begin < n_end) {
      const auto q_rows = RowPointer<kBytes>::make(a.q, a.q_stride, b, h);
      load_tile<TileQ, kThreads>(q_tile, q_rows.at(at.i0), q_rows.row_bytes, at.rows, static_cast<int>(a.D),
                                 p.is_aligned_q);
      load_keys(n_begin);
    }

    for (int n = n_begin; n < n_end; ++n) {
      cp_async_wait<0>();
      sync_block();  // this tile of keys (and q) has arrived; the one before has been used by all
      if (n + 1 < n_end) load_keys(n + 1);

      const SharedAddress k_tile = k_tiles + n % 2 * TileK::kBytes;
      Scores s;
      set_zero(s);
      gemm_nt<TileQ, TileK>(s, a_fragment_address<TileQ>(q_tile, warp_row()), b_fragment_address<TileK>(k_tile));
      const int j0 = n * kBlockN;
      score(s, p, b, h, at.i0, j0, j0 >= full_begin && j0 + kBlockN <= full_end);
      step(s, j0, k_tile);
      reconverge();
    }
  }

  // Products become scores.
  FASTATTN_DEVICE void score(Scores& s, const WalkParams& p, int b, int h, int i0, int j0, bool is_full) {
    const MaskGeometry geometry = geometry_again(p.attention, b);
    const int last_row = static_cast<int>(p.attention.Lq) - 1;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = i0 + lane_row() + 8 * n;
      const int i = row < last_row ? row : last_row;  // rows beyond the last compute what nobody reads
      RowInterval seen = {0, 0x7fffffff};
      if (!is_full) seen = row_interval(geometry, i);
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = j0 + 8 * tile + 2 * (lane_index() & 3) + e;
          float& x = s[0][tile][2 * n + e];
          x = j < seen.lo || j >= seen.hi ? -kInfinity : score_of<kAllModifiers>(p, geometry, x, b, h, i, j);
        }
      }
    }
    reconverge();
  }
};

// kAllHeads: a CTA walks over all query heads that share its key head; otherwise over one query head.
template <DType kType, int kDim, bool kAllModifiers, bool kAllHeads, int kParts = 1>
struct KeyWalk {
  static constexpr WalkTiles kTiles = walk_tiles(kType, kDim);
  static constexpr int kBlockN = kTiles.resident, kBlockM = kTiles.streamed, kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kElementBytes<kType>;
  using TileK = Tile<kType, kBlockN, kDim>;
  using TileQ = Tile<kType, kBlockM, kDim>;
  static constexpr int kStatBytes = 16;  // of a row
  static constexpr int kStageBytes = TileQ::kBytes + kBlockM * kStatBytes;
  static constexpr int kSharedBytes = TileK::kBytes + 2 * kStageBytes;
  static constexpr int kN = kBlockM / 8;
  static_assert(kBlockN == 16 * kWarps && kBlockM % 16 == 0);

  // Element [0][tile][e] is key lane_row() + 8 (e / 2), query 8 tile + 2 t + e % 2; t = lane % 4.
  using Products = float[1][kN][4];

  struct Place {
    int b, head, j0, part;  // head: of the keys, or with kAllHeads = false of the queries
  };
  FASTATTN_DEVICE Place place(const WalkParams& p, uint32_t cta_index) {
    const int heads = static_cast<int>(kAllHeads ? p.attention.Hkv : p.attention.Hq);
    const int cta = static_cast<int>(cta_index), block = cta / kParts, bh = block / p.key_blocks;
    return {bh / heads, bh % heads, block % p.key_blocks * kBlockN, cta % kParts};
  }
  FASTATTN_DEVICE Place place_again(const WalkParams& p) {
    return place(p, opaque(static_cast<uint32_t>(block_index())));
  }

  FASTATTN_DEVICE int warp_row() { return warp_index() * 16; }  // of the tile's keys, the first of this warp's
  // Of the tile's keys, the first of this lane's two; the other one is 8 further.
  FASTATTN_DEVICE int lane_row() { return warp_row() + (lane_index() >> 2); }

  // all_stats: [B, Hq, Lq]. weigh(x, i, j, row): what becomes of the score x of a visible pair (i, j); a hidden one, or
  // one of a row that does not exist, becomes 0. step(x, q_tile) takes a tile of that, and the rows of q themselves.
  template <class Weigh, class Step>
  FASTATTN_DEVICE void run(const WalkParams& p, const F32x4* all_stats, Weigh weigh, Step step) {
    const AttentionParams& a = p.attention;
    const Place at = place(p, static_cast<uint32_t>(block_index()));
    const int group = static_cast<int>(a.Hq / a.Hkv);
    const int b = at.b, j0 = at.j0, hkv = kAllHeads ? at.head : at.head / group;
    const int first_head = kAllHeads ? at.head * group : at.head;

    const MaskGeometry geometry = mask_geometry(a, b);
    const int Lk = static_cast<int>(geometry.Lk);
    const int j1 = j0 + kBlockN < Lk ? j0 + kBlockN : Lk;
    TileRange range = {};
    if (j0 < j1) range = row_range(geometry, j0, j1);
    const int m_begin = static_cast<int>(range.begin) / kBlockM;
    const int m_end = range.end > range.begin ? static_cast<int>((range.end + kBlockM - 1) / kBlockM) : m_begin;
    const int tiles = m_end - m_begin;  // of rows, for each query head
    const int steps = kAllHeads ? tiles * group : tiles;

    const SharedAddress k_tile = shared_base(), stages = k_tile + TileK::kBytes;
    const auto load_rows = [&](int n) {
      const SharedAddress q_tile = stages + n % 2 * kStageBytes;
      const int h = first_head + (kAllHeads ? n / tiles : 0), i0 = (m_begin + (kAllHeads ? n % tiles : n)) * kBlockM;
      const int rows = static_cast<int>(a.Lq) - i0;
      const auto q_rows = RowPointer<kBytes>::make(a.q, a.q_stride, b, h);
      load_tile<TileQ, kThreads>(q_tile, q_rows.at(i0), q_rows.row_bytes, rows, static_cast<int>(a.D), p.is_aligned_q);
      const F32x4* stats = all_stats + (static_cast<int64_t>(b) * a.Hq + h) * a.Lq;
      for (int row = thread_index(); row < kBlockM; row += kThreads) {
        const bool exists = row < rows;
        cp_async_16(q_tile + TileQ::kBytes + row * kStatBytes, stats + (exists ? i0 + row : 0), exists ? 16 : 0);
      }
      cp_async_commit();
    };
    if (steps > 0) {
      const auto k_rows = RowPointer<kBytes>::make(a.k, a.k_stride, b, hkv);
      load_tile<TileK, kThreads>(k_tile, k_rows.at(j0), k_rows.row_bytes, Lk - j0, static_cast<int>(a.D),
                                 p.is_aligned_k);
      load_rows(0);
    }

    for (int n = 0; n < steps; ++n) {
      cp_async_wait<0>();
      sync_block();  // these rows (and the keys) have arrived; the rows before them have been used by all
      if (n + 1 < steps) load_rows(n + 1);

      const SharedAddress q_tile = stages + n % 2 * kStageBytes, stats = q_tile + TileQ::kBytes;
      const int h = first_head + (kAllHeads ? n / tiles : 0), i0 = (m_begin + (kAllHeads ? n % tiles : n)) * kBlockM;
      Products x;
      set_zero(x);
      gemm_nt<TileK, TileQ, true>(x, a_fragment_address<TileK>(k_tile, warp_row()), b_fragment_address<TileQ>(q_tile));
      const MaskGeometry again = geometry_again(a, b);
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * tile + 2 * (lane_index() & 3) + e, i = i0 + column;
          const F32x4 row = load_shared_f32x4(stats + static_cast<SharedAddress>(column * kStatBytes));
          const RowInterval seen = row_interval(again, i);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = j0 + lane_row() + 8 * half;
            float& y = x[0][tile][2 * half + e];
            y = i >= a.Lq || j < seen.lo || j >= seen.hi
                    ? 0.0f
                    : weigh(score_of<kAllModifiers>(p, again, y, b, h, i, j), j, row);
          }
        }
      }
      reconverge();
      step(x, q_tile);
    }
  }
};

}  // namespace fastattn::cuda
