// Hard attention, backward: what flows through log_prob into q and k (REINFORCE), and through o to the values taken.
//
//   dS_ij = d_log_prob_i ((j = index_i) - p_ij)        p_ij = exp(s_ij - m_i) / l_i
//   dq_i = scale sum_j dS_ij k_j      dk_j = scale sum_i dS_ij q_i      dv_j = sum of dO_i over the i with index_i = j
//
// dq and dk take two products each, where attention takes three: dS needs neither v nor dO. dv takes none: it is a sum
// of rows of dO, in the order of the rows. No sum depends on who comes first.
//
// (Williams, "Simple statistical gradient-following algorithms", 1992; Xu et al., "Show, attend and tell", 2015,
// section 4.1.)
#pragma once

#include "cuda/combine.cuh"
#include "cuda/score_walk.cuh"

namespace fastattn::cuda {

struct HardBackwardParams {
  WalkParams walk;
  F32x4* row_stats = nullptr;         // [B, Hq, Lq] of HardRow
  const int64_t* index = nullptr;     // [B, Hq, Lq]
  const float* d_log_prob = nullptr;  // [B, Hq, Lq]
  const void* d_o = nullptr;          // [B, Hq, Lq, Dv]
  int64_t d_o_stride[3] = {};

  void* dq = nullptr;  // [B, Hq, Lq, D]
  void* dk = nullptr;  // [B, Hkv, Lk, D]
  void* dv = nullptr;  // [B, Hkv, Lk, Dv]
  int64_t dq_stride[3] = {}, dk_stride[3] = {}, dv_stride[3] = {};
  bool is_aligned_dq = false, is_aligned_dk = false;
};

// Of a query row, as 16 bytes. Rows that see nothing, and rows beyond the last, have a gradient of 0.
struct HardRow {
  float m, inverse_l;
  float gradient;  // d_log_prob
  int key;         // index

  FASTATTN_DEVICE HardRow from(F32x4 v) { return {v.x[0], v.x[1], v.x[2], static_cast<int>(float_bits(v.x[3]))}; }
  // dS of a visible key.
  FASTATTN_ALWAYS_INLINE float score_gradient(float score, int j) const {
    return gradient * ((j == key ? 1.0f : 0.0f) - weight_below(score, m) * inverse_l);
  }
};

// One thread = one row [b, hq, i].
struct HardRowsKernel {
  using Params = HardBackwardParams;
  static constexpr const char* kName = "hard_attention_backward_rows";
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.walk.attention;
    const int64_t row = block_index() * kThreads + thread_index();
    if (row >= a.B * a.Hq * a.Lq) return;
    const float m = static_cast<const float*>(a.row_max)[row], l = static_cast<const float*>(a.row_sum)[row];
    F32x4 stats = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (l != 0.0f) {
      stats = {{m, 1.0f / l, p.d_log_prob[row], bits_float(static_cast<uint32_t>(static_cast<int>(p.index[row])))}};
    }
    p.row_stats[row] = stats;
  }
};

// The end of a tile of dq or dk: scaled, rounded, and by way of the warp's own 16 rows of a tile in shared memory,
// which only this warp has read, to `rows` rows of `columns` elements from `out` on.
template <class Tile, int kD>
FASTATTN_DEVICE void write_gradient(float (&acc)[1][kD][4], float scale, SharedAddress staging, int warp_row, char* out,
                                    int64_t row_bytes, int rows, int columns, bool is_aligned) {
#pragma unroll
  for (int tile = 0; tile < kD; ++tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][tile][e] *= scale;
  }
  sync_warp();
  store_accumulators<Tile>(acc, staging, warp_row);
  sync_warp();
  const auto out_row = [&](int row) { return out + row * row_bytes; };
  store_rows<Tile, 16>(staging, out_row, warp_row, rows, columns < 8 * kD ? columns : 8 * kD, is_aligned);
}

template <DType kType, int kDim_>
struct HardQueriesKernel {
  using Params = HardBackwardParams;
  static constexpr int kParts = gradient_parts(kType, kDim_);
  using Walk = RowWalk<kType, kDim_, false, kParts>;
  static constexpr int kDim = kDim_;
  static constexpr const char* kName = "hard_attention_backward_dq";
  static constexpr int kBlockM = Walk::kBlockM, kBlockN = Walk::kBlockN, kThreads = Walk::kThreads, kN = Walk::kN;
  static constexpr int kSharedBytes = Walk::kSharedBytes;
  static constexpr int kMinBlocks = 2;
  static constexpr int kColumns = kDim / kParts;  // of the gradient, for each CTA
  static constexpr int kD = kColumns / 8;

  FASTATTN_DEVICE void run(const Params& p) {
    float dq[1][kD][4];
    set_zero(dq);
    HardRow rows[2];
    {
      const AttentionParams& a = p.walk.attention;
      const typename Walk::Place at = Walk::place_again(p.walk);
      const int64_t first = (static_cast<int64_t>(at.b) * a.Hq + at.h) * a.Lq + at.i0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = Walk::lane_row() + 8 * n;
        rows[n] = {0.0f, 0.0f, 0.0f, -1};
        if (row < at.rows) rows[n] = HardRow::from(p.row_stats[first + row]);
      }
    }
    const int part = static_cast<int>(block_index() % kParts);
    const SharedAddress first_byte = static_cast<SharedAddress>(part * kColumns * Walk::kBytes);
    Walk::run(p.walk, [&](typename Walk::Scores& s, int j0, SharedAddress k_tile) {
#pragma unroll
      for (int tile = 0; tile < kN; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = j0 + 8 * tile + 2 * (lane_index() & 3) + e % 2;
          s[0][tile][e] = rows[e / 2].score_gradient(s[0][tile][e], j);
        }
      }
      gemm_rn<typename Walk::TileK>(dq, s, bt_fragment_address<typename Walk::TileK>(k_tile + first_byte));
    });

    const typename Walk::Place at = Walk::place_again(p.walk);
    const int column = at.part * kColumns;
    const int64_t(&stride)[3] = p.dq_stride;
    char* const out =
        static_cast<char*>(p.dq) + (at.b * stride[0] + at.h * stride[1] + at.i0 * stride[2] + column) * Walk::kBytes;
    write_gradient<typename Walk::TileQ>(dq, p.walk.constants.scale, shared_base(), Walk::warp_row(), out,
                                         stride[2] * Walk::kBytes, at.rows,
                                         static_cast<int>(p.walk.attention.D) - column, p.is_aligned_dq);
  }
};

template <DType kType, int kDim_>
struct HardKeysKernel {
  using Params = HardBackwardParams;
  static constexpr int kParts = gradient_parts(kType, kDim_);
  using Walk = KeyWalk<kType, kDim_, false, true, kParts>;
  static constexpr int kDim = kDim_;
  static constexpr const char* kName = "hard_attention_backward_dk";
  static constexpr int kBlockM = Walk::kBlockM, kBlockN = Walk::kBlockN, kThreads = Walk::kThreads;
  static constexpr int kSharedBytes = Walk::kSharedBytes;
  static constexpr int kMinBlocks = 2;
  static constexpr int kColumns = kDim / kParts;  // of the gradient, for each CTA
  static constexpr int kD = kColumns / 8;

  FASTATTN_DEVICE void run(const Params& p) {
    float dk[1][kD][4];
    set_zero(dk);
    const int part = static_cast<int>(block_index() % kParts);
    const SharedAddress first_byte = static_cast<SharedAddress>(part * kColumns * Walk::kBytes);
    const auto weigh = [](float score, int j, F32x4 row) { return HardRow::from(row).score_gradient(score, j); };
    Walk::run(p.walk, p.row_stats, weigh, [&](typename Walk::Products& ds, SharedAddress q_tile) {
      gemm_rn<typename Walk::TileQ>(dk, ds, bt_fragment_address<typename Walk::TileQ>(q_tile + first_byte));
    });

    const typename Walk::Place at = Walk::place_again(p.walk);
    const int column = at.part * kColumns;
    const int64_t(&stride)[3] = p.dk_stride;
    char* const out =
        static_cast<char*>(p.dk) + (at.b * stride[0] + at.head * stride[1] + at.j0 * stride[2] + column) * Walk::kBytes;
    write_gradient<typename Walk::TileK>(dk, p.walk.constants.scale, shared_base(), Walk::warp_row(), out,
                                         stride[2] * Walk::kBytes, static_cast<int>(p.walk.attention.Lk) - at.j0,
                                         static_cast<int>(p.walk.attention.D) - column, p.is_aligned_dk);
  }
};

// dv. One CTA = one warp = kKeys keys of one (batch, key head): it goes through the indices of all rows that see any of
// them, 32 at a time, of one query head after the other, and adds up the rows of dO that take one of its keys, in that
// order. A lane owns every 32nd column, and what it sums lies in shared memory where only itself looks: it waits for
// nobody. The rows that take one key may be many or none; hits are taken kBatch at a time, whose loads are under way
// together.
template <DType kType>
struct HardValuesKernel {
  using Params = HardBackwardParams;
  static constexpr const char* kName = "hard_attention_backward_dv";
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 16;
  static constexpr int kKeys = 8;
  static constexpr int kBatch = 4;
  static constexpr int kColumns = static_cast<int>(kMaxHeadDim);
  static constexpr int kSharedBytes = kKeys * kColumns * 4;
  static constexpr int kBytes = kElementBytes<kType>;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.walk.attention;
    const int lane = thread_index();
    const int64_t key_blocks = (a.Lk + kKeys - 1) / kKeys, block = block_index();
    const int64_t b = block / key_blocks / a.Hkv, hkv = block / key_blocks % a.Hkv;
    const int j0 = static_cast<int>(block % key_blocks) * kKeys;
    const int Dv = static_cast<int>(a.Dv);
    // Column `lane` of key 0; others follow at distances of kColumns and of 32 words.
    const SharedAddress sums = shared_base() + static_cast<SharedAddress>(lane * 4);

#pragma unroll 1
    for (int n = 0; n < kKeys; ++n) {
      for (int d = lane; d < Dv; d += 32) store_shared_f32(at(sums, n, d - lane), 0.0f);
    }
    const MaskGeometry geometry = mask_geometry(a, b);
    const int64_t j1 = min_i64(j0 + kKeys, geometry.Lk);
    if (j0 < j1) {
      const TileRange range = row_range(geometry, j0, j1);
      const int group = static_cast<int>(a.Hq / a.Hkv);
      for (int g = 0; g < group; ++g) {
        const int64_t h = hkv * group + g;
        add_rows(sums, p, b, h, j0, static_cast<int>(range.begin), static_cast<int>(range.end), lane);
      }
    }
    char* const out = static_cast<char*>(p.dv) + (b * p.dv_stride[0] + hkv * p.dv_stride[1]) * kBytes;
#pragma unroll 1
    for (int n = 0; n < kKeys && j0 + n < a.Lk; ++n) {
      char* const row = out + (j0 + n) * p.dv_stride[2] * kBytes;
      for (int d = lane; d < Dv; d += 32) store_rounded<kType>(row, d, load_shared_f32(at(sums, n, d - lane)));
    }
  }

  // first_column: of the 32 that the warp's lanes hold together.
  FASTATTN_DEVICE SharedAddress at(SharedAddress sums, int key, int first_column) {
    return sums + static_cast<SharedAddress>((key * kColumns + first_column) * 4);
  }

  // Of one query head's rows [begin, end).
  FASTATTN_DEVICE void add_rows(SharedAddress sums, const Params& p, int64_t b, int64_t h, int j0, int begin, int end,
                                int lane) {
    const AttentionParams& a = p.walk.attention;
    const int64_t* const index = p.index + (b * a.Hq + h) * a.Lq;
    const auto rows = RowPointer<kBytes>::make(p.d_o, p.d_o_stride, b, h);
    const int Dv = static_cast<int>(a.Dv);
#pragma unroll 1
    for (int i0 = begin; i0 < end; i0 += 32) {
      const int64_t key = i0 + lane < end ? index[i0 + lane] - j0 : -1;
      uint32_t hits = key >= 0 && key < kKeys ? 1u << lane : 0u;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) hits |= shuffle_xor(hits, distance);
      while (hits != 0) {
        int i[kBatch], n[kBatch];
        int count = 0;
#pragma unroll
        for (int batch = 0; batch < kBatch; ++batch) {
          const bool is_hit = hits != 0;
          i[batch] = i0 + lowest_bit(is_hit ? hits : 1u);
          n[batch] = is_hit ? static_cast<int>(index[i[batch]] - j0) : 0;
          hits &= hits - 1;
          count += is_hit;
        }
        for (int d = lane; d < Dv; d += 32) {
          float x[kBatch];
#pragma unroll
          for (int batch = 0; batch < kBatch; ++batch) {
            x[batch] = batch < count ? load_as_float(rows.at(i[batch]), kType, d) : 0.0f;
          }
#pragma unroll
          for (int batch = 0; batch < kBatch; ++batch) {
            const SharedAddress sum = at(sums, n[batch], d - lane);
            if (batch < count) store_shared_f32(sum, load_shared_f32(sum) + x[batch]);
          }
        }
      }
    }
  }
};

// Zeros, where nothing flows. One warp = one row [b, h, i].
struct ZeroRowsParams {
  void* out = nullptr;  // [rows / H / L, H, L, dim]
  int64_t stride[3] = {};
  int64_t H = 0, L = 0, dim = 0, rows = 0;
};

template <DType kType>
struct ZeroRowsKernel {
  using Params = ZeroRowsParams;
  static constexpr const char* kName = "zero_rows";
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / 32;

  FASTATTN_DEVICE void run(const Params& p) {
    const int64_t row = block_index() * kRowsPerBlock + (thread_index() >> 5);
    if (row >= p.rows) return;
    const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
    char* const out =
        static_cast<char*>(p.out) + (b * p.stride[0] + h * p.stride[1] + i * p.stride[2]) * kElementBytes<kType>;
    for (int64_t d = thread_index() & 31; d < p.dim; d += 32) store_rounded<kType>(out, d, 0.0f);
  }
};

}  // namespace fastattn::cuda
