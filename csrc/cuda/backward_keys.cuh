// Attention, backward: dk and dv.
//
//   dv_j = sum_i z w_ij dO_i       dk_j = scale sum_i dS'_ij q_i       dS' = dS * d softcap       (gradient.cuh)
//
// One CTA = `resident` keys of one (batch, key head); it walks over the query rows that see any of them, of all the
// query heads that share the key head, one after the other: every sum has one order, and nothing is written twice.
// Scores are computed transposed, [key][query]: a warp owns whole keys, and the weights it has in registers are the
// left operand of both products, so that they never go through shared memory.
//
// The next tile of q and dO arrives while this one is used, where two fit (stages = 2).
#pragma once

#include "cuda/gradient.cuh"

namespace fastattn::cuda {

template <DType kType, int kDim, bool kModified, bool kWantsDk, bool kWantsDv>
struct BackwardKeysKernel {
  using Params = BackwardParams;
  static constexpr const char* kName = kWantsDk && kWantsDv ? "attention_backward_dk_dv"
                                       : kWantsDk           ? "attention_backward_dk"
                                                            : "attention_backward_dv";
  static constexpr BackwardTiles kTiles = backward_tiles(kType, kDim);
  static constexpr int kBlockN = kTiles.resident, kBlockM = kTiles.streamed, kStages = kTiles.stages;
  static constexpr int kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kElementBytes<kType>;

  using TileKV = Tile<kType, kBlockN, kDim>;
  using TileQ = Tile<kType, kBlockM, kDim>;
  static constexpr int kStatBytes = kBlockM * 16;
  // k, v (only dk needs it), then for each stage q, dO and the rows' statistics.
  static constexpr int kStageBytes = 2 * TileQ::kBytes + kStatBytes;
  static constexpr int kSharedBytes = (kWantsDk ? 2 : 1) * TileKV::kBytes + kStages * kStageBytes;
  static constexpr int kMinBlocks = 2 * kSharedBytes <= 200 * 1024 ? 2 : 1;
  static_assert(kSharedBytes <= 99 * 1024);

  static constexpr int kM = kBlockN / kWarps / 16;  // 16-key tiles of a warp
  static constexpr int kN = kBlockM / 8;            // 8-query tiles
  static constexpr int kParts = gradient_parts(kType, kDim);
  static constexpr int kColumns = kDim / kParts;  // of the gradient, from Coordinates::column on
  static constexpr int kD = kColumns / 8;
  static_assert(kBlockN == 16 * kM * kWarps && kBlockM % 16 == 0);

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const Coordinates start = coordinates(p);
    const int b = start.b, hkv = start.hkv, j0 = start.j0, first_byte = start.column * kBytes;
    const int group = static_cast<int>(a.Hq / a.Hkv);

    if (start.keys <= 0) return;  // a sequence shorter than the longest of those that are packed

    const MaskGeometry geometry = sequence_geometry(a, b);
    const int Lk = static_cast<int>(geometry.Lk);
    const int j1 = j0 + kBlockN < Lk ? j0 + kBlockN : Lk;
    TileRange range = {};
    if (j0 < j1) range = row_range(geometry, j0, j1);
    const int m_begin = static_cast<int>(range.begin) / kBlockM;
    const int m_end = range.end > range.begin ? static_cast<int>((range.end + kBlockM - 1) / kBlockM) : m_begin;
    // A tile with keys that do not exist is never full: their weights must come out as 0.
    const int full_begin = static_cast<int>(range.full_begin);
    const int full_end = j0 + kBlockN <= Lk ? static_cast<int>(range.full_end) : full_begin;
    const int tiles = m_end - m_begin;  // of rows, for each query head
    const int steps = tiles * group;

    const SharedAddress k_tile = shared_base(), v_tile = k_tile + TileKV::kBytes;
    const SharedAddress stages = k_tile + (kWantsDk ? 2 : 1) * TileKV::kBytes;
    // With modifiers not even this one number has a register throughout the loop.
    const auto sequence = [&] { return kModified ? coordinates(p).b : b; };
    const auto load_rows = [&](int step) {
      const SharedAddress q_tile = stages + step % kStages * kStageBytes, d_o_tile = q_tile + TileQ::kBytes;
      const int h = hkv * group + step / tiles, i0 = (m_begin + step % tiles) * kBlockM;
      const int b = sequence();
      const PackedSequence own = sequence_rows(a, b);
      const int rows = static_cast<int>(own.rows) - i0;
      const auto q_rows = RowPointer<kBytes>::make(a.q, a.q_stride, b, h);
      const auto d_o_rows = RowPointer<kBytes>::make(p.grad.d_o, p.grad.d_o_stride, b, h);
      load_tile<TileQ, kThreads>(q_tile, q_rows.at(own.first_row + i0), q_rows.row_bytes, rows, static_cast<int>(a.D),
                                 p.is_aligned_q);
      load_tile<TileQ, kThreads>(d_o_tile, d_o_rows.at(own.first_row + i0), d_o_rows.row_bytes, rows,
                                 static_cast<int>(a.Dv), p.is_aligned_d_o);
      const F32x4* stats = p.row_stats + p.stats.at(b, h, own.first_row);
      for (int row = thread_index(); row < kBlockM; row += kThreads) {
        const bool exists = row < rows;
        cp_async_16(d_o_tile + TileQ::kBytes + row * 16, stats + (exists ? i0 + row : 0), exists ? 16 : 0);
      }
      cp_async_commit();
    };

    float dk[kWantsDk ? kM : 1][kD][4], dv[kWantsDv ? kM : 1][kD][4];
    set_zero(dk);
    set_zero(dv);
    if (steps > 0) {
      const int64_t first_key = sequence_rows(a, b).first_key + j0;
      const auto k_rows = RowPointer<kBytes>::make(a.k, a.k_stride, b, hkv);
      load_tile<TileKV, kThreads>(k_tile, k_rows.at(first_key), k_rows.row_bytes, Lk - j0, static_cast<int>(a.D),
                                  p.is_aligned_k);
      if constexpr (kWantsDk) {
        const auto v_rows = RowPointer<kBytes>::make(a.v, a.v_stride, b, hkv);
        load_tile<TileKV, kThreads>(v_tile, v_rows.at(first_key), v_rows.row_bytes, Lk - j0, static_cast<int>(a.Dv),
                                    p.is_aligned_v);
      }
      load_rows(0);
    }

    for (int step = 0; step < steps; ++step) {
      cp_async_wait<0>();
      sync_block();  // this step's rows have arrived; the rows of the step before have been used by all
      if (kStages == 2 && step + 1 < steps) load_rows(step + 1);

      const SharedAddress q_tile = stages + step % kStages * kStageBytes, d_o_tile = q_tile + TileQ::kBytes;
      const SharedAddress stats = d_o_tile + TileQ::kBytes;

      float s[kM][kN][4], dp[kM][kN][4];
      set_zero(s);
      gemm_nt<TileKV, TileQ, true>(s, a_fragment_address<TileKV>(k_tile, warp_row()),
                                   b_fragment_address<TileQ>(q_tile));
      set_zero(dp);
      if constexpr (kWantsDk) {
        gemm_nt<TileKV, TileQ, true>(dp, a_fragment_address<TileKV>(v_tile, warp_row()),
                                     b_fragment_address<TileQ>(d_o_tile));
      }

      const int h = hkv * group + step / tiles, i0 = (m_begin + step % tiles) * kBlockM;
      if constexpr (kModified) {
        differentiate(s, dp, p, stats, sequence(), h, i0, j0 + warp_row());
        reconverge();
      } else {
        if (i0 < full_begin || i0 + kBlockM > full_end) hide(s, p, b, i0, j0 + warp_row());
#pragma unroll
        for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const RowStatistics row = load_shared_statistics(stats, 8 * tile + 2 * (lane_index() & 3) + e);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
              differentiate_plain(s[m][tile][e], dp[m][tile][e], row, p.constants);
              differentiate_plain(s[m][tile][2 + e], dp[m][tile][2 + e], row, p.constants);
            }
          }
        }
      }

      if constexpr (kWantsDv) gemm_rn<TileQ>(dv, s, bt_fragment_address<TileQ>(d_o_tile + first_byte));
      if constexpr (kWantsDk) gemm_rn<TileQ>(dk, dp, bt_fragment_address<TileQ>(q_tile + first_byte));

      if (kStages == 1 && step + 1 < steps) {
        sync_block();  // the rows have been used by all: the next ones may take their place
        load_rows(step + 1);
      }
    }

    // By way of the warp's own rows of k's and v's tiles, which only this warp has read.
    const Coordinates at = coordinates(p);
    if constexpr (kWantsDk) {
      write(dk, at, p.constants.scale, k_tile, p.grad.dk, p.grad.dk_stride, p.is_aligned_dk, static_cast<int>(a.D));
    }
    if constexpr (kWantsDv) {
      const float factor = kModified ? p.constants.keep_scale : 1.0f;
      write(dv, at, factor, kWantsDk ? v_tile : k_tile, p.grad.dv, p.grad.dv_stride, p.is_aligned_dv,
            static_cast<int>(a.Dv));
    }
  }

  // Where a CTA works. Computed again at the end: kept from the start, it would take registers all the way.
  struct Coordinates {
    int b, hkv, j0, column;
    int keys;           // from j0 on, whose gradients are to be written; hidden ones too
    int64_t first_key;  // j0 among the keys of all sequences
  };
  FASTATTN_DEVICE Coordinates coordinates(const Params& p) {
    const int Hkv = static_cast<int>(p.grad.forward.Hkv);
    const int cta = static_cast<int>(opaque(static_cast<uint32_t>(block_index())));
    const int block = cta / kParts, bh = block / p.key_blocks;
    const int b = bh / Hkv, j0 = block % p.key_blocks * kBlockN;
    const PackedSequence own = sequence_rows(p.grad.forward, b);
    return {b, bh % Hkv, j0, cta % kParts * kColumns, static_cast<int>(own.keys) - j0, own.first_key + j0};
  }

  FASTATTN_DEVICE int warp_row() { return warp_index() * 16 * kM; }  // of the tile's keys, the first of this warp's

  FASTATTN_DEVICE RowStatistics load_shared_statistics(SharedAddress stats, int row) {
    return RowStatistics::from(load_shared_f32x4(stats + static_cast<SharedAddress>(row * 16)));
  }

  FASTATTN_DEVICE void hide(float (&s)[kM][kN][4], const Params& p, int b, int i0, int first_key) {
    const Intervals geometry = intervals(p.grad.forward, b);
    const int lane = lane_index();
#pragma unroll
    for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowInterval seen = row_interval(geometry, i0 + 8 * tile + 2 * (lane & 3) + e);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = first_key + 16 * m + (lane >> 2) + 8 * half;
            if (j < seen.lo || j >= seen.hi) s[m][tile][2 * half + e] = -kInfinity;
          }
        }
      }
    }
  }

  FASTATTN_DEVICE void differentiate(float (&s)[kM][kN][4], float (&dp)[kM][kN][4], const Params& p,
                                     SharedAddress stats, int b, int h, int i0, int first_key) {
    const int lane = lane_index();
    const AttentionParams& a = p.grad.forward;
    const Intervals geometry = intervals(a, b);
    const DropoutSeed seed = dropout_seed(a);
#pragma unroll
    for (int tile = 0; tile < kN; ++tile) {
      uint32_t kept[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        kept[m] = p.constants.has_dropout
                      ? dropout_bits_transposed(seed, p.constants.dropout_threshold, dropout_head(a, b, h),
                                                i0 + 8 * tile, first_key + 16 * m)
                      : 15u;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * tile + 2 * (lane & 3) + e, i = i0 + column;
        const RowStatistics row = load_shared_statistics(stats, column);
        const RowInterval seen = row_interval(geometry, i);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = first_key + 16 * m + (lane >> 2) + 8 * half;
            float &x = s[m][tile][2 * half + e], &y = dp[m][tile][2 * half + e];
            // 1 / l = 0: a row that does not exist, or sees nothing. Its number would take a register, and spill.
            if (row.inverse_l == 0.0f || j < seen.lo || j >= seen.hi) {
              x = y = 0.0f;
            } else {
              differentiate_modified(x, y, row, kept[m] >> (2 * half + e) & 1u, p, geometry, b, h, i, j);
            }
          }
        }
      }
    }
  }

  FASTATTN_DEVICE void write(float (&acc)[kM][kD][4], const Coordinates& at, float factor, SharedAddress staging,
                             void* tensor, const int64_t (&stride)[3], bool is_aligned, int dim) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int tile = 0; tile < kD; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][tile][e] *= factor;
      }
    }
    char* const out = static_cast<char*>(tensor) +
                      (at.b * stride[0] + at.hkv * stride[1] + at.first_key * stride[2] + at.column) * kBytes;
    sync_warp();
    store_accumulators<TileKV>(acc, staging, warp_row());
    sync_warp();
    const auto out_row = [&](int row) { return out + row * stride[2] * kBytes; };
    const int columns = dim - at.column < kColumns ? dim - at.column : kColumns;
    store_rows<TileKV, 16 * kM>(staging, out_row, warp_row(), at.keys, columns, is_aligned);
  }
};

}  // namespace fastattn::cuda
