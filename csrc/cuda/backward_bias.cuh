// Attention, backward: the gradient of the bias, in the bias's own shape.
//
//   d_bias = dS, summed over the dimensions that the bias broadcasts                           (gradient.cuh)
//
// One CTA = one tile of d_bias, and all or a chunk of the tiles of dS that add up to it: those of the other batches,
// heads, queries or keys along which the bias is broadcast. It computes them one after the other, adds them up in
// registers, and sums over broadcast queries and keys once, at the end. Every sum has one order. Where that leaves too
// few CTAs to fill the device, the tiles of dS are cut into chunks, whose sums SumChunksKernel adds.
#pragma once

#include "cuda/gradient.cuh"

namespace fastattn::cuda {

struct BiasGradientParams {
  BackwardParams backward;
  // Tiles along batch, head, query and key: those that d_bias has, and those that are summed over. One of each pair is
  // 1.
  int64_t kept[4] = {1, 1, 1, 1}, summed[4] = {1, 1, 1, 1};
  int64_t steps = 1;   // product of `summed`
  int64_t chunks = 1;  // among which the steps are shared out
  int64_t elements = 0;
  float* sums = nullptr;  // [chunks, elements]; with one chunk, d_bias itself
};

template <DType kType, int kDim>
struct BackwardBiasKernel {
  using Params = BiasGradientParams;
  static constexpr const char* kName = "attention_backward_bias";
  static constexpr BackwardTiles kTiles = backward_tiles(kType, kDim);
  static constexpr int kBlockM = kTiles.resident, kBlockN = kTiles.streamed;
  static constexpr int kWarps = kTiles.warps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kElementBytes<kType>;

  using TileQ = Tile<kType, kBlockM, kDim>;
  using TileKV = Tile<kType, kBlockN, kDim>;
  static constexpr int kSharedBytes = 2 * TileQ::kBytes + 2 * TileKV::kBytes;
  static constexpr int kMinBlocks = 2 * kSharedBytes <= 200 * 1024 ? 2 : 1;

  static constexpr int kM = kBlockM / kWarps / 16;
  static constexpr int kN = kBlockN / 8;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.backward.grad.forward;
    int64_t block = block_index();
    int64_t tile[4];  // batch, head, query tile, key tile
#pragma unroll
    for (int dim = 3; dim >= 0; --dim) {
      tile[dim] = block % p.kept[dim];
      block /= p.kept[dim];
    }
    const int64_t chunk = block;
    const int64_t steps_per_chunk = (p.steps + p.chunks - 1) / p.chunks;
    const int64_t first_step = chunk * steps_per_chunk;
    const int64_t end_step = first_step + steps_per_chunk < p.steps ? first_step + steps_per_chunk : p.steps;

    const SharedAddress q_tile = shared_base(), d_o_tile = q_tile + TileQ::kBytes;
    const SharedAddress k_tile = d_o_tile + TileQ::kBytes, v_tile = k_tile + TileKV::kBytes;
    float sum[kM][kN][4];
    set_zero(sum);

    for (int64_t step = first_step; step < end_step; ++step) {
      int64_t at[4];
      int64_t rest = step;
#pragma unroll
      for (int dim = 3; dim >= 0; --dim) {
        at[dim] = tile[dim] + rest % p.summed[dim];
        rest /= p.summed[dim];
      }
      const int b = static_cast<int>(at[0]), h = static_cast<int>(at[1]);
      const int i0 = static_cast<int>(at[2]) * kBlockM, j0 = static_cast<int>(at[3]) * kBlockN;
      const MaskGeometry geometry = sequence_geometry(a, b);
      const int rows = geometry.Lq - i0 < kBlockM ? static_cast<int>(geometry.Lq) - i0 : kBlockM;
      if (rows <= 0) continue;  // a sequence shorter than the longest of those that are packed
      if (classify_tile(geometry, i0, i0 + rows, j0, j0 + kBlockN) == TileKind::kSkip) continue;

      sync_block();  // the tiles of the step before have been used by all
      load_operands(p.backward, geometry, b, h, i0, rows, j0, q_tile, d_o_tile, k_tile, v_tile);
      cp_async_wait<0>();
      sync_block();  // the tiles have arrived

      float s[kM][kN][4], dp[kM][kN][4];
      set_zero(s);
      gemm_nt<TileQ, TileKV>(s, a_fragment_address<TileQ>(q_tile, warp_row()), b_fragment_address<TileKV>(k_tile));
      set_zero(dp);
      gemm_nt<TileQ, TileKV>(dp, a_fragment_address<TileQ>(d_o_tile, warp_row()), b_fragment_address<TileKV>(v_tile));
      add_gradients(sum, s, dp, p.backward, b, h, i0 + warp_row() + (lane_index() >> 2), j0);
    }
    write(sum, p, tile, chunk);
  }

  FASTATTN_DEVICE int warp_row() { return warp_index() * 16 * kM; }  // of the tile's rows, the first of this warp's

  FASTATTN_DEVICE void load_operands(const BackwardParams& p, const MaskGeometry& geometry, int b, int h, int i0,
                                     int rows, int j0, SharedAddress q_tile, SharedAddress d_o_tile,
                                     SharedAddress k_tile, SharedAddress v_tile) {
    const AttentionParams& a = p.grad.forward;
    const int hkv = h / static_cast<int>(a.Hq / a.Hkv), keys = static_cast<int>(geometry.Lk) - j0;
    const int D = static_cast<int>(a.D), Dv = static_cast<int>(a.Dv);
    const auto q_rows = RowPointer<kBytes>::make(a.q, a.q_stride, b, h);
    const auto d_o_rows = RowPointer<kBytes>::make(p.grad.d_o, p.grad.d_o_stride, b, h);
    const auto k_rows = RowPointer<kBytes>::make(a.k, a.k_stride, b, hkv);
    const auto v_rows = RowPointer<kBytes>::make(a.v, a.v_stride, b, hkv);
    const PackedSequence own = sequence_rows(a, b);
    const int64_t row = own.first_row + i0, key = own.first_key + j0;
    load_tile<TileQ, kThreads>(q_tile, q_rows.at(row), q_rows.row_bytes, rows, D, p.is_aligned_q);
    load_tile<TileQ, kThreads>(d_o_tile, d_o_rows.at(row), d_o_rows.row_bytes, rows, Dv, p.is_aligned_d_o);
    load_tile<TileKV, kThreads>(k_tile, k_rows.at(key), k_rows.row_bytes, keys, D, p.is_aligned_k);
    load_tile<TileKV, kThreads>(v_tile, v_rows.at(key), v_rows.row_bytes, keys, Dv, p.is_aligned_v);
    cp_async_commit();
  }

  FASTATTN_DEVICE void add_gradients(float (&sum)[kM][kN][4], float (&s)[kM][kN][4], float (&dp)[kM][kN][4],
                                     const BackwardParams& p, int b, int h, int first_row, int j0) {
    const AttentionParams& a = p.grad.forward;
    const Intervals geometry = intervals(a, b);
    const DropoutSeed seed = dropout_seed(a);
    const int64_t bh = dropout_head(a, b, h);
    const F32x4* const all_stats = p.row_stats + p.stats.at(b, h, sequence_rows(a, b).first_row);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int row[2] = {first_row + 16 * m, first_row + 16 * m + 8};
      const RowInterval seen[2] = {row_interval(geometry, row[0]), row_interval(geometry, row[1])};
      const RowStatistics stats[2] = {load_statistics(all_stats, row[0], geometry.rows),
                                      load_statistics(all_stats, row[1], geometry.rows)};
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
        const uint32_t kept = p.constants.has_dropout ? dropout_bits(seed, p.constants.dropout_threshold, bh, bh,
                                                                     row[0], row[1], j0 + 8 * tile)
                                                      : 15u;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = row[e / 2], j = j0 + 8 * tile + 2 * (lane_index() & 3) + e % 2;
          if (i < geometry.rows && j >= seen[e / 2].lo && j < seen[e / 2].hi) {
            sum[m][tile][e] += differentiate_modified(s[m][tile][e], dp[m][tile][e], stats[e / 2], kept >> e & 1u, p,
                                                      geometry, b, h, i, j);
          }
        }
      }
    }
  }

  // An odd number of words to a row, so that neither rows nor columns share a bank.
  static constexpr int kSumStride = kBlockN + 1;
  static_assert(kBlockM * kSumStride * 4 <= kSharedBytes, "the sums take the tiles' place at the end");
  FASTATTN_DEVICE SharedAddress sum_address(int row, int column) {
    return shared_base() + static_cast<SharedAddress>((row * kSumStride + column) * 4);
  }

  // Sums over the queries or keys along which the bias is broadcast, and writes what remains.
  FASTATTN_DEVICE void write(const float (&sum)[kM][kN][4], const Params& p, const int64_t (&tile)[4], int64_t chunk) {
    const AttentionParams& a = p.backward.grad.forward;
    const int64_t(&stride)[4] = p.backward.grad.d_bias_stride;
    const bool sums_queries = stride[2] == 0, sums_keys = stride[3] == 0;
    sync_block();  // the last step's tiles have been used by all
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp_row() + 16 * m + (lane_index() >> 2) + 8 * (e / 2);
          store_shared_f32(sum_address(row, 8 * n + 2 * (lane_index() & 3) + e % 2), sum[m][n][e]);
        }
      }
    }
    sync_block();  // the sums are complete
    if (sums_keys) {
      for (int row = thread_index(); row < kBlockM; row += kThreads) {
        float total = 0.0f;
        for (int column = 0; column < kBlockN; ++column) total += load_shared_f32(sum_address(row, column));
        store_shared_f32(sum_address(row, 0), total);
      }
      sync_block();  // column 0 has the sums over keys
    }
    if (sums_queries) {
      for (int column = thread_index(); column < (sums_keys ? 1 : kBlockN); column += kThreads) {
        float total = 0.0f;
        for (int row = 0; row < kBlockM; ++row) total += load_shared_f32(sum_address(row, column));
        store_shared_f32(sum_address(0, column), total);
      }
      // No barrier: the thread that wrote a column is the one that reads it below.
      static_assert(kBlockN <= kThreads);
    }
    const int64_t i0 = tile[2] * kBlockM, j0 = tile[3] * kBlockN;
    const int rows = sums_queries ? 1 : a.Lq - i0 < kBlockM ? static_cast<int>(a.Lq - i0) : kBlockM;
    const int columns = sums_keys ? 1 : a.Lk - j0 < kBlockN ? static_cast<int>(a.Lk - j0) : kBlockN;
    float* const out =
        p.sums + chunk * p.elements + tile[0] * stride[0] + tile[1] * stride[1] + i0 * stride[2] + j0 * stride[3];
    for (int n = thread_index(); n < rows * columns; n += kThreads) {
      const int row = n / columns, column = n % columns;
      out[row * stride[2] + column * stride[3]] = load_shared_f32(sum_address(row, column));
    }
  }
};

// d_bias = the sum of the chunks. One thread = one element.
struct SumChunksKernel {
  using Params = BiasGradientParams;
  static constexpr const char* kName = "attention_backward_bias_sum";
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;

  FASTATTN_DEVICE void run(const Params& p) {
    const int64_t element = block_index() * kThreads + thread_index();
    if (element >= p.elements) return;
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += p.sums[chunk * p.elements + element];
    static_cast<float*>(p.backward.grad.d_bias)[element] = sum;
  }
};

}  // namespace fastattn::cuda
