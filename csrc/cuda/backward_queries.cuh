// Attention, backward: dq.
//
//   dq_i = scale sum_j dS'_ij k_j                                                              (gradient.cuh)
//
// One CTA = `resident` query rows of one (batch, query head); it walks over the keys that they see. A warp owns whole
// rows. q and dO stay in shared memory; the next tile of k and v arrives while this one is used, where two fit.
#pragma once

#include "cuda/gradient.cuh"

namespace fastattn::cuda {

template <DType kType, int kDim, bool kModified>
struct BackwardQueriesKernel {
  using Params = BackwardParams;
  static constexpr const char* kName = "attention_backward_dq";
  static constexpr BackwardTiles kTiles = backward_tiles(kType, kDim);
  static constexpr int kBlockM = kTiles.resident, kBlockN = kTiles.streamed, kStages = kTiles.stages;
  static constexpr int kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kElementBytes<kType>;

  using TileQ = Tile<kType, kBlockM, kDim>;
  using TileKV = Tile<kType, kBlockN, kDim>;
  static constexpr int kStageBytes = 2 * TileKV::kBytes;
  static constexpr int kSharedBytes = 2 * TileQ::kBytes + kStages * kStageBytes;
  static constexpr int kMinBlocks = 2 * kSharedBytes <= 200 * 1024 ? 2 : 1;
  static_assert(kSharedBytes <= 99 * 1024);

  static constexpr int kM = kBlockM / kWarps / 16;
  static constexpr int kN = kBlockN / 8;
  static constexpr int kParts = gradient_parts(kType, kDim);
  static constexpr int kColumns = kDim / kParts;  // of the gradient, from Coordinates::column on
  static constexpr int kD = kColumns / 8;
  static constexpr int kRows = 2 * kM;
  static_assert(kBlockM == 16 * kM * kWarps && kBlockN % 16 == 0);

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const Coordinates at = coordinates(p);
    const int b = at.b, h = at.h, i0 = at.i0, rows = at.rows, first_byte = at.column * kBytes;
    if (rows <= 0) return;  // a sequence shorter than the longest of those that are packed
    const MaskGeometry geometry = sequence_geometry(a, b);
    const TileRange keys = key_range(geometry, i0, i0 + rows);
    const int full_begin = static_cast<int>(keys.full_begin), full_end = static_cast<int>(keys.full_end);
    const int n_begin = static_cast<int>(keys.begin / kBlockN);
    const int n_end = keys.end > keys.begin ? static_cast<int>((keys.end + kBlockN - 1) / kBlockN) : n_begin;

    const SharedAddress q_tile = shared_base(), d_o_tile = q_tile + TileQ::kBytes, stages = d_o_tile + TileQ::kBytes;
    const int key_count = static_cast<int>(geometry.Lk);
    const auto load_keys = [&](int n) {
      const SharedAddress k_tile = stages + (n - n_begin) % kStages * kStageBytes;
      const int rows_left = key_count - n * kBlockN;
      const int hkv = static_cast<int>(opaque(static_cast<uint32_t>(h))) / static_cast<int>(a.Hq / a.Hkv);
      const auto k_rows = RowPointer<kBytes>::make(a.k, a.k_stride, b, hkv);
      const auto v_rows = RowPointer<kBytes>::make(a.v, a.v_stride, b, hkv);
      const int64_t first_key = sequence_rows(a, b).first_key + n * kBlockN;
      load_tile<TileKV, kThreads>(k_tile, k_rows.at(first_key), k_rows.row_bytes, rows_left, static_cast<int>(a.D),
                                  p.is_aligned_k);
      load_tile<TileKV, kThreads>(k_tile + TileKV::kBytes, v_rows.at(first_key), v_rows.row_bytes, rows_left,
                                  static_cast<int>(a.Dv), p.is_aligned_v);
      cp_async_commit();
    };

    float dq[kM][kD][4];
    set_zero(dq);
    const int first_row = i0 + warp_row() + (lane_index() >> 2);  // row 0 of the lane
    RowStatistics stats[kRows];
    if constexpr (!kModified) {
      const F32x4* const all_stats = p.row_stats + p.stats.at(b, h, at.first_row - i0);
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        stats[n] = load_statistics(all_stats, first_row + 16 * (n / 2) + 8 * (n % 2), geometry.Lq);
      }
    }
    if (n_begin < n_end) {
      const auto q_rows = RowPointer<kBytes>::make(a.q, a.q_stride, b, h);
      const auto d_o_rows = RowPointer<kBytes>::make(p.grad.d_o, p.grad.d_o_stride, b, h);
      load_tile<TileQ, kThreads>(q_tile, q_rows.at(at.first_row), q_rows.row_bytes, rows, static_cast<int>(a.D),
                                 p.is_aligned_q);
      load_tile<TileQ, kThreads>(d_o_tile, d_o_rows.at(at.first_row), d_o_rows.row_bytes, rows, static_cast<int>(a.Dv),
                                 p.is_aligned_d_o);
      load_keys(n_begin);
    }

    for (int n = n_begin; n < n_end; ++n) {
      cp_async_wait<0>();
      sync_block();  // this tile of keys has arrived; the one before has been used by all
      if (kStages == 2 && n + 1 < n_end) load_keys(n + 1);

      const SharedAddress k_tile = stages + (n - n_begin) % kStages * kStageBytes;
      float s[kM][kN][4], dp[kM][kN][4];
      set_zero(s);
      gemm_nt<TileQ, TileKV>(s, a_fragment_address<TileQ>(q_tile, warp_row()), b_fragment_address<TileKV>(k_tile));
      set_zero(dp);
      gemm_nt<TileQ, TileKV>(dp, a_fragment_address<TileQ>(d_o_tile, warp_row()),
                             b_fragment_address<TileKV>(k_tile + TileKV::kBytes));

      const int j0 = n * kBlockN;
      if constexpr (kModified) {
        differentiate(s, dp, p, b, h, first_row, j0);
        reconverge();
      } else {
        const bool is_full = j0 >= full_begin && j0 + kBlockN <= full_end;
        Intervals visible;
        if (!is_full) visible = intervals(a, b);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          RowInterval seen = {0, 0x7fffffff};
          if (!is_full) seen = row_interval(visible, first_row + 16 * (r / 2) + 8 * (r % 2));
#pragma unroll
          for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float &x = s[r / 2][tile][2 * (r % 2) + e], &y = dp[r / 2][tile][2 * (r % 2) + e];
              if (!is_full) {
                const int j = j0 + 8 * tile + 2 * (lane_index() & 3) + e;
                if (j < seen.lo || j >= seen.hi) x = -kInfinity;
              }
              differentiate_plain(x, y, stats[r], p.constants);
            }
          }
        }
      }

      gemm_rn<TileKV>(dq, dp, bt_fragment_address<TileKV>(k_tile + first_byte));

      if (kStages == 1 && n + 1 < n_end) {
        sync_block();  // the keys have been used by all: the next ones may take their place
        load_keys(n + 1);
      }
    }

#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int tile = 0; tile < kD; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[m][tile][e] *= p.constants.scale;
      }
    }
    write(dq, p);
  }

  // Where a CTA works. Computed again at the end: kept from the start, it would take registers all the way.
  struct Coordinates {
    int b, h, i0, rows, column;
    int64_t first_row;  // i0 among the rows of all sequences
  };
  FASTATTN_DEVICE Coordinates coordinates(const Params& p) {
    const int row_blocks = p.row_blocks, Hq = static_cast<int>(p.grad.forward.Hq);
    const int cta = static_cast<int>(opaque(static_cast<uint32_t>(block_index())));
    const int block = cta / kParts;
    const int i0 = (row_blocks - 1 - block % row_blocks) * kBlockM;
    const int bh = block / row_blocks, b = bh / Hq;
    const PackedSequence own = sequence_rows(p.grad.forward, b);
    const int left = static_cast<int>(own.rows) - i0;
    return {b, bh % Hq, i0, left < kBlockM ? left : kBlockM, cta % kParts * kColumns, own.first_row + i0};
  }

  // By way of the warp's own rows of q's tile, which only this warp has read.
  FASTATTN_DEVICE void write(const float (&dq)[kM][kD][4], const Params& p) {
    const Coordinates at = coordinates(p);
    const int64_t(&stride)[3] = p.grad.dq_stride;
    char* const out = static_cast<char*>(p.grad.dq) +
                      (at.b * stride[0] + at.h * stride[1] + at.first_row * stride[2] + at.column) * kBytes;
    const SharedAddress staging = shared_base();
    sync_warp();
    store_accumulators<TileQ>(dq, staging, warp_row());
    sync_warp();
    const auto out_row = [&](int row) { return out + row * stride[2] * kBytes; };
    const int left = static_cast<int>(p.grad.forward.D) - at.column;
    store_rows<TileQ, 16 * kM>(staging, out_row, warp_row(), at.rows, left < kColumns ? left : kColumns,
                               p.is_aligned_dq);
  }

  FASTATTN_DEVICE int warp_row() { return warp_index() * 16 * kM; }  // of the tile's rows, the first of this warp's

  FASTATTN_DEVICE void differentiate(float (&s)[kM][kN][4], float (&dp)[kM][kN][4], const Params& p, int b, int h,
                                     int first_row, int j0) {
    const AttentionParams& a = p.grad.forward;
    const Intervals geometry = intervals(a, b);
    const DropoutSeed seed = dropout_seed(a);
    const int64_t bh = dropout_head(a, b, h);
    const F32x4* const all_stats = p.row_stats + p.stats.at(b, h, sequence_rows(a, b).first_row);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int low = first_row + 16 * m, high = low + 8;
      const RowInterval seen[2] = {row_interval(geometry, low), row_interval(geometry, high)};
      const RowStatistics stats[2] = {load_statistics(all_stats, low, geometry.rows),
                                      load_statistics(all_stats, high, geometry.rows)};
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
        const uint32_t kept = p.constants.has_dropout
                                  ? dropout_bits(seed, p.constants.dropout_threshold, bh, bh, low, high, j0 + 8 * tile)
                                  : 15u;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = e < 2 ? low : high, j = j0 + 8 * tile + 2 * (lane_index() & 3) + e % 2;
          float &x = s[m][tile][e], &y = dp[m][tile][e];
          if (i >= geometry.rows || j < seen[e / 2].lo || j >= seen[e / 2].hi) {
            x = y = 0.0f;
          } else {
            differentiate_modified(x, y, stats[e / 2], kept >> e & 1u, p, geometry, b, h, i, j);
          }
        }
      }
    }
  }
};

}  // namespace fastattn::cuda
