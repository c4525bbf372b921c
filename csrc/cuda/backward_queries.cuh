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
  static constexpr int kD = kDim / 8;
  static constexpr int kRows = 2 * kM;
  static_assert(kBlockM == 16 * kM * kWarps && kBlockN % 16 == 0);

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const int thread = thread_index(), lane = thread & 31, warp = thread >> 5;
    int64_t block = block_index();
    const int row_block = p.row_blocks - 1 - static_cast<int>(block % p.row_blocks);
    block /= p.row_blocks;
    const int h = static_cast<int>(block % a.Hq), b = static_cast<int>(block / a.Hq);
    const int hkv = h / static_cast<int>(a.Hq / a.Hkv);

    const int i0 = row_block * kBlockM;
    const int rows = a.Lq - i0 < kBlockM ? static_cast<int>(a.Lq) - i0 : kBlockM;
    const MaskGeometry geometry = mask_geometry(a, b);
    const TileRange keys = key_range(geometry, i0, i0 + rows);
    const int full_begin = static_cast<int>(keys.full_begin), full_end = static_cast<int>(keys.full_end);
    const int n_begin = static_cast<int>(keys.begin / kBlockN);
    const int n_end = keys.end > keys.begin ? static_cast<int>((keys.end + kBlockN - 1) / kBlockN) : n_begin;

    const SharedAddress q_tile = shared_base(), d_o_tile = q_tile + TileQ::kBytes, stages = d_o_tile + TileQ::kBytes;
    const auto load_keys = [&](int n) {
      const SharedAddress k_tile = stages + (n - n_begin) % kStages * kStageBytes;
      const int rows_left = static_cast<int>(geometry.Lk) - n * kBlockN;
      const auto k_rows = RowPointer<kBytes>::make(a.k, a.k_stride, b, hkv);
      const auto v_rows = RowPointer<kBytes>::make(a.v, a.v_stride, b, hkv);
      load_tile<TileKV, kThreads>(
          k_tile, [&](int row) { return k_rows.at(n * kBlockN + row); }, rows_left, static_cast<int>(a.D),
          p.is_aligned_k);
      load_tile<TileKV, kThreads>(
          k_tile + TileKV::kBytes, [&](int row) { return v_rows.at(n * kBlockN + row); }, rows_left,
          static_cast<int>(a.Dv), p.is_aligned_v);
      cp_async_commit();
    };

    float dq[kM][kD][4];
    set_zero(dq);
    const int first_row = i0 + warp * 16 * kM + (lane >> 2);  // row 0 of the lane
    RowStatistics stats[kRows];
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int i = first_row + 16 * (n / 2) + 8 * (n % 2);
      stats[n] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (i < a.Lq) stats[n] = RowStatistics::from(p.row_stats[(static_cast<int64_t>(b) * a.Hq + h) * a.Lq + i]);
    }
    if (n_begin < n_end) {
      const auto q_rows = RowPointer<kBytes>::make(a.q, a.q_stride, b, h);
      const auto d_o_rows = RowPointer<kBytes>::make(p.grad.d_o, p.grad.d_o_stride, b, h);
      load_tile<TileQ, kThreads>(
          q_tile, [&](int row) { return q_rows.at(i0 + row); }, rows, static_cast<int>(a.D), p.is_aligned_q);
      load_tile<TileQ, kThreads>(
          d_o_tile, [&](int row) { return d_o_rows.at(i0 + row); }, rows, static_cast<int>(a.Dv), p.is_aligned_d_o);
      load_keys(n_begin);
    }
    const SharedAddress q_fragment =
        a_fragment_address<TileQ>(q_tile, lane) + static_cast<SharedAddress>(warp * 16 * kM * TileQ::kRowBytes);

    for (int n = n_begin; n < n_end; ++n) {
      cp_async_wait<0>();
      sync_block();  // this tile of keys has arrived; the one before has been used by all
      if (kStages == 2 && n + 1 < n_end) load_keys(n + 1);

      const SharedAddress k_tile = stages + (n - n_begin) % kStages * kStageBytes;
      float s[kM][kN][4], dp[kM][kN][4];
      set_zero(s);
      gemm_nt<TileQ, TileKV>(s, q_fragment, b_fragment_address<TileKV>(k_tile, lane));
      set_zero(dp);
      gemm_nt<TileQ, TileKV>(dp, q_fragment + TileQ::kBytes, b_fragment_address<TileKV>(k_tile + TileKV::kBytes, lane));

      const int j0 = n * kBlockN;
      if constexpr (kModified) {
        differentiate(s, dp, p, stats, b, h, first_row, j0, lane);
      } else {
        const bool is_full = j0 >= full_begin && j0 + kBlockN <= full_end;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          RowInterval seen = {0, 0x7fffffff};
          if (!is_full) seen = row_interval(geometry, first_row + 16 * (r / 2) + 8 * (r % 2));
#pragma unroll
          for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float &x = s[r / 2][tile][2 * (r % 2) + e], &y = dp[r / 2][tile][2 * (r % 2) + e];
              if (!is_full) {
                const int j = j0 + 8 * tile + 2 * (lane & 3) + e;
                if (j < seen.lo || j >= seen.hi) x = -kInfinity;
              }
              differentiate_plain(x, y, stats[r], p.constants);
            }
          }
        }
      }

      gemm_rn<TileKV>(dq, dp, bt_fragment_address<TileKV>(k_tile, lane));

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
    // By way of the warp's own rows of q's tile, which only this warp has read.
    const int64_t(&stride)[3] = p.grad.dq_stride;
    char* const out = static_cast<char*>(p.grad.dq) + (b * stride[0] + h * stride[1] + i0 * stride[2]) * kBytes;
    sync_warp();
    store_accumulators<TileQ>(dq, q_tile, warp * 16 * kM, lane);
    sync_warp();
    store_tile<TileQ, 16 * kM, 32>(
        q_tile, lane, [&](int row) { return out + row * stride[2] * kBytes; }, warp * 16 * kM, rows,
        static_cast<int>(a.D), p.is_aligned_dq);
  }

  FASTATTN_DEVICE void differentiate(float (&s)[kM][kN][4], float (&dp)[kM][kN][4], const Params& p,
                                     const RowStatistics (&stats)[kRows], int b, int h, int first_row, int j0,
                                     int lane) {
    const AttentionParams& a = p.grad.forward;
    // Computed anew for each tile: registers are what these kernels are short of.
    const MaskGeometry geometry = mask_geometry(a, opaque(static_cast<uint32_t>(b)));
    const DropoutSeed seed = dropout_seed(a);
    const int64_t bh = static_cast<int64_t>(b) * a.Hq + h;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int low = first_row + 16 * m, high = low + 8;
      const RowInterval seen[2] = {row_interval(geometry, low), row_interval(geometry, high)};
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
        const uint32_t kept = p.constants.has_dropout ? dropout_bits(seed, p.constants.dropout_threshold, bh, bh, low,
                                                                     high, j0 + 8 * tile)
                                                      : 15u;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = e < 2 ? low : high, j = j0 + 8 * tile + 2 * (lane & 3) + e % 2;
          float &x = s[m][tile][e], &y = dp[m][tile][e];
          if (i >= a.Lq || j < seen[e / 2].lo || j >= seen[e / 2].hi) {
            x = y = 0.0f;
          } else {
            differentiate_modified(x, y, stats[2 * m + e / 2], kept >> e & 1u, p, geometry, b, h, i, j);
          }
        }
      }
    }
  }
};

}  // namespace fastattn::cuda
