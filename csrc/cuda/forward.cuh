// Attention, forward: o, lse and the row statistics, in one pass over the keys with an online softmax.
//
//   s = modify(scale * q k^T)      p = exp(s - m)      o = dropout(p) v / l      m, l: row maximum and sum so far
//
// (Dao, "FlashAttention-2", 2023, algorithm 1, section 3.1; Milakov and Gimelshein, 2018, for the online softmax.)
//
// One CTA = kBlockM rows of one (batch, head), and with splits one part of their keys. A warp owns kBlockM / kWarps
// whole rows: no row is shared, so that the softmax needs no shared memory. q stays in shared memory; k and v take
// turns with one tile each, so that a tile of v arrives while scores are computed and the next tile of k while v is
// used. Keys are walked from the last tile to the first: the masked ones at a causal diagonal come first.
//
// Without modifiers (score.cuh: has_modifiers) m is the maximum of the raw products, and p one multiply-add and one
// exp2. With them m is the maximum of the scores, and p = exp2((s - m) log2(e)): a bias of finfo.min times log2(e)
// would be -inf, and a row full of it would be taken for one that sees nothing.
#pragma once

#include "cuda/cache_tile.cuh"
#include "cuda/finish.cuh"
#include "cuda/gemm.cuh"
#include "cuda/rows.cuh"
#include "cuda/score.cuh"

namespace fastattn::cuda {

struct ForwardParams {
  AttentionParams attention;
  ScoreConstants constants;
  int packed_heads = 1;  // query heads in one tile: 1, or all that share their keys
  int row_blocks = 1;    // tiles of rows for each (batch, head or group of heads)
  int splits = 1;        // parts into which the keys of a tile are split
  StatStrides stats;
  int64_t stat_rows = 0;  // of all sequences and heads
  bool is_aligned_q = false, is_aligned_k = false, is_aligned_v = false, is_aligned_o = false;

  // With splits > 1, what each part has found: sums over its keys, not divided by anything. Rows as those of lse.
  float* partial_o = nullptr;  // [splits, stat_rows, Dv]
  float* partial_m = nullptr;  // [splits, stat_rows], of scores
  float* partial_l = nullptr;  // [splits, stat_rows]
};

template <DType kType_, int kDim_, int kBlockM_, int kBlockN_, int kWarps_, bool kModified_, bool kSwizzled = true>
struct ForwardKernel {
  using Params = ForwardParams;
  static constexpr DType kType = kType_;
  static constexpr int kDim = kDim_, kBlockM = kBlockM_, kBlockN = kBlockN_, kWarps = kWarps_;
  static constexpr bool kModified = kModified_;
  static constexpr const char* kName = "attention_forward";
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBytes = kElementBytes<kType>;

  using TileQ = Tile<kType, kBlockM, kDim, kSwizzled>;
  using TileKV = Tile<kType, kBlockN, kDim, kSwizzled>;
  static constexpr int kSharedBytes = TileQ::kBytes + 2 * TileKV::kBytes;
  // As many CTAs as fit on a multiprocessor of 227 KB should fit by registers as well, up to 255 for each thread. A
  // third one, which 64 x 64 of 128 columns have had room for on sm_80, must not be lost to a few registers.
  static constexpr bool kFitsThrice = kModified && kBytes == 2 && kDim == 128 && kBlockM == 64;
  static constexpr int kMinBlocks = kFitsThrice ? 3 : kWarps <= 4 && 2 * kSharedBytes <= 200 * 1024 ? 2 : 1;

  static constexpr int kM = kBlockM / kWarps / 16;  // 16-row tiles of a warp
  static constexpr int kN = kBlockN / 8;            // 8-key tiles
  static constexpr int kD = kDim / 8;
  static constexpr int kRows = 2 * kM;  // rows of which a lane holds a part
  static_assert(kBlockM == 16 * kM * kWarps && kBlockN % 16 == 0 && kDim % 32 == 0);

  // A multiply-add rounds m log2(e): too much for large biases, and more than float32 results should bear.
  static constexpr bool kExactDifference = kModified || kType == DType::kFloat32;

  // Element e of the accumulator tile i of a warp belongs to row n = 2 i + e / 2 of the lane.
  struct Rows {
    int r0;  // the tile's first row
    float m[kRows], l[kRows];

    // Row n of the lane, among all rows of the (batch, head).
    FASTATTN_ALWAYS_INLINE int r(int n) const {
      return r0 + warp_row() + (lane_index() >> 2) + 16 * (n / 2) + 8 * (n % 2);
    }
  };

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.attention;
    // Tiles of one (batch, head) are neighbours, so that its keys stay in L2; those with the most keys start first.
    int64_t block = block_index();
    const int row_block = p.row_blocks - 1 - static_cast<int>(block % p.row_blocks);
    block /= p.row_blocks;
    const int split = static_cast<int>(block % p.splits);
    block /= p.splits;
    const int heads = static_cast<int>(a.Hq) / p.packed_heads;
    const int b = static_cast<int>(block / heads);
    // Heads are packed where rows are few, which the plain kernels do not serve.
    const int packed_heads = kModified ? p.packed_heads : 1;
    const QueryRows rows = {static_cast<int>(block % heads) * packed_heads, packed_heads};
    const int hkv = rows.first_head / static_cast<int>(a.Hq / a.Hkv);

    const MaskGeometry geometry = sequence_geometry(a, b);
    const int all_rows = static_cast<int>(geometry.Lq) * packed_heads;
    const int r0 = row_block * kBlockM;
    if (r0 >= all_rows) return;  // a sequence shorter than the longest of those that are packed
    const int block_rows = all_rows - r0 < kBlockM ? all_rows - r0 : kBlockM;
    const TileRange keys = key_range(geometry, rows.query(r0), rows.query(r0 + block_rows - 1) + 1);
    const int full_begin = static_cast<int>(keys.full_begin), full_end = static_cast<int>(keys.full_end);
    const auto [n_begin, n_end] = tiles_of_split<kBlockN>(keys, split, p.splits);

    const SharedAddress q_tile = shared_base(), k_tile = q_tile + TileQ::kBytes, v_tile = k_tile + TileKV::kBytes;
    const int key_count = static_cast<int>(geometry.Lk), key_begin = static_cast<int>(keys.begin);
    const auto load_k = [&](int n) {
      load_keys(k_tile, a, {a.k, a.k_stride, a.k_scale, a.k_scale_stride}, b, hkv, n * kBlockN, key_begin, key_count,
                static_cast<int>(a.D), p.is_aligned_k);
    };
    const auto load_v = [&](int n) {
      load_keys(v_tile, a, {a.v, a.v_stride, a.v_scale, a.v_scale_stride}, b, hkv, n * kBlockN, key_begin, key_count,
                static_cast<int>(a.Dv), p.is_aligned_v);
    };

    Rows state;
    state.r0 = r0;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      state.m[n] = -kInfinity;
      state.l[n] = 0.0f;
    }
    float o[kM][kD][4];
    set_zero(o);

    if (n_begin < n_end) {
      const int64_t first_row = sequence_rows(a, b).first_row;
      const auto q_row = [&](int row) {
        const auto head = RowPointer<kBytes>::make(a.q, a.q_stride, b, rows.head(r0 + row));
        return head.at(first_row + rows.query(r0 + row));
      };
      load_scattered_tile<TileQ, kThreads>(q_tile, q_row, block_rows, static_cast<int>(a.D), p.is_aligned_q);
      load_k(n_end - 1);
    }

    for (int n = n_end - 1; n >= n_begin; --n) {
      cp_async_wait<0>();
      sync_block();  // k (and q) have arrived; v of the tile before has been used by all
      load_v(n);

      float s[kM][kN][4];
      set_zero(s);
      gemm_nt<TileQ, TileKV>(s, a_fragment_address<TileQ>(q_tile, warp_row()), b_fragment_address<TileKV>(k_tile));
      const int j0 = n * kBlockN;
      const bool is_full = j0 >= full_begin && j0 + kBlockN <= full_end;
      if constexpr (kModified) {
        modify(s, p, rows, state, b, j0);
        reconverge();
      } else if (!is_full) {
        hide(s, p, rows, state, b, j0);
      }
      // Before the barrier, and so in another block of code than the product: ptxas then has the sums done before it
      // starts on that, and does not keep every weight both as it is and rounded.
      update_softmax(s, o, state, p.constants);
      if constexpr (kModified) {
        if (p.constants.has_dropout) drop(s, p, rows, state, b, j0);
      }

      cp_async_wait<0>();
      sync_block();  // v has arrived; k has been used by all
      if (n > n_begin) load_k(n - 1);
      gemm_rn<TileKV>(o, s, bt_fragment_address<TileKV>(v_tile));
    }

    finish_sums(state, p.constants);
    if (p.splits > 1) {
      write_partial(o, state, p, rows, b, split);
    } else {
      write_results(o, state, p, rows, b, r0, q_tile);
    }
  }

  FASTATTN_DEVICE int warp_row() { return warp_index() * 16 * kM; }  // of the tile's rows, the first of this warp's

  // A tile of keys or values, from key j0 on; of those that are looked up, [begin, keys) alone, which rows here see.
  FASTATTN_DEVICE void load_keys(SharedAddress tile, const AttentionParams& a, const CacheTensor& t, int b, int hkv,
                                 int j0, int begin, int keys, int dim, bool is_aligned) {
    const int head = static_cast<int>(opaque(static_cast<uint32_t>(hkv)));
    // Pages and int8 are left to the kernels with modifiers: the plain ones have no registers for more addresses.
    if (kModified && is_gathered<kBlockN>(a)) {
      gather_cache_tile<TileKV, kThreads>(tile, a, t, b, head, j0, begin, keys, dim, is_aligned);
    } else {
      // Rows one after the other: the sequence's own, or those of a page that has all of the tile.
      CachePlace first = {b, static_cast<int>(sequence_rows(a, b).first_key) + j0};
      if (kModified && a.block_table != nullptr) first = cache_place(a, b, j0);
      const char* const rows = static_cast<const char*>(t.data) +
                               (first.batch * t.stride[0] + head * t.stride[1] + first.row * t.stride[2]) * kBytes;
      load_tile<TileKV, kThreads>(tile, rows, t.stride[2] * kBytes, keys - j0, dim, is_aligned);
    }
    cp_async_commit();
  }

  // Scores of keys outside of the rows' intervals become -inf.
  FASTATTN_DEVICE void hide(float (&s)[kM][kN][4], const Params& p, QueryRows rows, const Rows& state, int b, int j0) {
    const Intervals geometry = intervals(p.attention, b);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const RowInterval seen = row_interval(geometry, rows.query(state.r(n)));
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = j0 + 8 * tile + 2 * (lane_index() & 3) + e;
          float& x = s[n / 2][tile][2 * (n % 2) + e];
          if (j < seen.lo || j >= seen.hi) x = -kInfinity;
        }
      }
    }
  }

  // Raw products become scores.
  FASTATTN_DEVICE void modify(float (&s)[kM][kN][4], const Params& p, QueryRows rows, const Rows& state, int b,
                              int j0) {
    const Intervals geometry = intervals(p.attention, b);
    const int last_row = geometry.rows * rows.heads - 1;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int r = state.r(n) < last_row ? state.r(n) : last_row;  // rows beyond the last compute what nobody reads
      const int i = rows.query(r), h = rows.head(r);
      const RowInterval seen = row_interval(geometry, i);
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = j0 + 8 * tile + 2 * (lane_index() & 3) + e;
          float& x = s[n / 2][tile][2 * (n % 2) + e];
          x = j < seen.lo || j >= seen.hi ? -kInfinity
                                          : modified(p.attention, geometry, capped(p.constants, x).value, b, h, i, j);
        }
      }
    }
  }

  // Scores become weights relative to the new maximum; what was summed so far is brought to it as well.
  FASTATTN_DEVICE void update_softmax(float (&s)[kM][kN][4], float (&o)[kM][kD][4], Rows& state,
                                      const ScoreConstants& constants) {
    const float log2_factor = kModified ? kLog2E : constants.scale_log2;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      float m = state.m[n];
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
        m = fmaxf(m, fmaxf(s[n / 2][tile][2 * (n % 2)], s[n / 2][tile][2 * (n % 2) + 1]));
      }
      m = fmaxf(m, shuffle_xor(m, 1));
      m = fmaxf(m, shuffle_xor(m, 2));
      // m = -inf: the row has seen nothing. Any finite number does as a base then, and -inf itself would give NaN.
      const float base = m == -kInfinity ? 0.0f : m;
      const float rescale = exp2_approx((state.m[n] - base) * log2_factor);
      state.m[n] = m;
      const float scaled_base = multiply(base, log2_factor);
      float sum = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n / 2][tile][2 * (n % 2) + e];
          x = exp2_approx(kExactDifference ? (x - base) * log2_factor : multiply_add(x, log2_factor, -scaled_base));
          sum += x;
        }
      }
      state.l[n] = state.l[n] * rescale + sum;
#pragma unroll
      for (int tile = 0; tile < kD; ++tile) {
        o[n / 2][tile][2 * (n % 2)] *= rescale;
        o[n / 2][tile][2 * (n % 2) + 1] *= rescale;
      }
    }
  }

  FASTATTN_DEVICE void drop(float (&s)[kM][kN][4], const Params& p, QueryRows rows, const Rows& state, int b, int j0) {
    const DropoutSeed seed = dropout_seed(p.attention);
    const int64_t first_bh = dropout_head(p.attention, b, 0);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int low = state.r(2 * m), high = state.r(2 * m + 1);
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
        const uint32_t kept =
            dropout_bits(seed, p.constants.dropout_threshold, first_bh + rows.head(low), first_bh + rows.head(high),
                         rows.query(low), rows.query(high), j0 + 8 * tile);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!(kept >> e & 1u)) s[m][tile][e] = 0.0f;
        }
      }
    }
  }

  // Sums over the four lanes of a row, and maxima from products to scores.
  FASTATTN_DEVICE void finish_sums(Rows& state, const ScoreConstants& constants) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      state.l[n] += shuffle_xor(state.l[n], 1);
      state.l[n] += shuffle_xor(state.l[n], 2);
      if (!kExactDifference) {
        // The maximum's own weight, which the product's rounding keeps from being 1. A row where nothing else has any
        // is to say so: see AttentionParams::row_sum.
        const float own = multiply_add(state.m[n], constants.scale_log2, -multiply(state.m[n], constants.scale_log2));
        if (state.l[n] == exp2_approx(own)) state.l[n] = 1.0f;
      }
      if (!kModified) state.m[n] *= constants.scale;
    }
  }

  FASTATTN_DEVICE void write_partial(const float (&o)[kM][kD][4], const Rows& state, const Params& p, QueryRows rows,
                                     int b, int split) {
    const AttentionParams& a = p.attention;
    const PackedSequence own = sequence_rows(a, b);
    const int all_rows = static_cast<int>(own.rows) * rows.heads;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int r = state.r(n);
      if (r >= all_rows) continue;
      const int64_t at = split * p.stat_rows + p.stats.at(b, rows.head(r), own.first_row) + rows.query(r);
      if ((lane_index() & 3) == 0) {
        p.partial_m[at] = state.m[n];
        p.partial_l[at] = state.l[n];
      }
      float* out = p.partial_o + at * a.Dv;
#pragma unroll
      for (int tile = 0; tile < kD; ++tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int d = 8 * tile + 2 * (lane_index() & 3) + e;
          if (d < a.Dv) out[d] = o[n / 2][tile][2 * (n % 2) + e];
        }
      }
    }
  }

  FASTATTN_DEVICE void write_results(float (&o)[kM][kD][4], const Rows& state, const Params& p, QueryRows rows, int b,
                                     int r0, SharedAddress q_tile) {
    const AttentionParams& a = p.attention;
    const PackedSequence own = sequence_rows(a, b);
    const int rows_left = static_cast<int>(own.rows) * rows.heads - r0;
    const int block_rows = rows_left < kBlockM ? rows_left : kBlockM;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      const int r = state.r(n) < r0 + block_rows ? state.r(n) : r0 + block_rows - 1;
      const FinishedRow row = finish_row(a, {state.m[n], state.l[n]}, rows.head(r));
      const float factor = row.factor * (kModified ? p.constants.keep_scale : 1.0f);
#pragma unroll
      for (int tile = 0; tile < kD; ++tile) {
        o[n / 2][tile][2 * (n % 2)] *= factor;
        o[n / 2][tile][2 * (n % 2) + 1] *= factor;
      }
      if (state.r(n) < r0 + block_rows && (lane_index() & 3) == 0) {
        write_statistics(a, row, p.stats.at(b, rows.head(r), own.first_row) + rows.query(r));
      }
    }
    // By way of the warp's own rows of q's tile: whole 16-byte pieces of rows leave it. Only this warp has read them,
    // by ldmatrix, which is done for all lanes at once: nothing to wait for.
    store_accumulators<TileQ>(o, q_tile, warp_row());
    sync_warp();
    char* const out = static_cast<char*>(a.o);
    const auto o_row = [&](int row) {
      const int64_t i = own.first_row + rows.query(r0 + row), h = rows.head(r0 + row);
      return out + (b * a.o_stride[0] + h * a.o_stride[1] + i * a.o_stride[2]) * kBytes;
    };
    store_rows<TileQ, 16 * kM>(q_tile, o_row, warp_row(), block_rows, static_cast<int>(a.Dv), p.is_aligned_o);
  }
};

}  // namespace fastattn::cuda
