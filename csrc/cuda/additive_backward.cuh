// Attention with additive scores, backward: dq, dk, dv and dw. gradient.cuh has the formulas up to dS, additive.cuh
// those beyond. Scores are computed again, dP = dO . v with them; attention_backward_rows comes first, as for dot
// products. No atomic additions: every sum has one order.
#pragma once

#include "cuda/additive.cuh"
#include "cuda/gradient.cuh"

namespace fastattn::cuda {

struct AdditiveBackwardParams : BackwardParams {
  float* dw_parts = nullptr;  // [B, Hq, row_blocks, D]
};

// One CTA = kResident query rows of one (batch, head); it walks over the keys that they see. dq, and the part of dw
// that these rows have.
struct AdditiveBackwardRowsKernel : AdditiveBlock<true> {
  using Params = AdditiveBackwardParams;
  static constexpr const char* kName = "additive_backward_dq";
  static constexpr int kMinBlocks = 3;
  // dq, then dw: of that one row for each warp's group of lanes.
  static constexpr int kSumRows = kResident + 2 * kWarps;
  static constexpr int kSharedBytes = additive_shared_bytes(kSumRows, kMaxHeadDim);  // at most
  static int shared_bytes(const Params& p) { return additive_shared_bytes(kSumRows, p.grad.forward.D); }
  static_assert(kSharedBytes <= 99 * 1024);

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const int cta = static_cast<int>(block_index()), bh = cta / p.row_blocks;
    const int row_block = p.row_blocks - 1 - cta % p.row_blocks;
    const int b = bh / static_cast<int>(a.Hq), h = bh % static_cast<int>(a.Hq), i0 = row_block * kResident;
    const int hkv = h / static_cast<int>(a.Hq / a.Hkv);

    const int left = static_cast<int>(a.Lq) - i0, count = left < kResident ? left : kResident;
    const int active = active_rows(count);
    const MaskGeometry geometry = mask_geometry(a, b);
    const TileRange keys = key_range(geometry, i0, i0 + count);
    const int n_begin = static_cast<int>(keys.begin / kStreamed);
    const int n_end = keys.end > keys.begin ? static_cast<int>((keys.end + kStreamed - 1) / kStreamed) : n_begin;

    const int width = padded(a.D);
    const SharedAddress dq = shared_base() + kSumsAt, dw = dq + static_cast<SharedAddress>(kResident * width * 4);
    clear_cells(dq, width);
    for (int d0 = 0; d0 < width; d0 += kColumns) {
      store_shared_f32x4(cell(dw, width, 2 * warp() + group(), d0), {{0.0f, 0.0f, 0.0f, 0.0f}});
    }
    const AdditiveRows q = additive_rows(a.q, a.q_stride, a.dtype, b, h, i0, i0 + count, a.D, p.is_aligned_q);
    const AdditiveRows d_o =
        additive_rows(p.grad.d_o, p.grad.d_o_stride, a.dtype, b, h, i0, i0 + count, a.Dv, p.is_aligned_d_o);
    const void* w = static_cast<const char*>(a.w) + h * a.w_stride * element_bytes(a.dtype);

#pragma unroll 1
    for (int n = n_begin; n < n_end; ++n) {
      const int j0 = n * kStreamed;
      const AdditiveRows k = additive_rows(a.k, a.k_stride, a.dtype, b, hkv, j0, geometry.Lk, a.D, p.is_aligned_k);
      float s[4][4], dp[4][4];
      scores(s, q, k, a.dtype, w, active);
      products(dp, d_o, additive_rows(a.v, a.v_stride, a.dtype, b, hkv, j0, geometry.Lk, a.Dv, p.is_aligned_v), a.dtype,
               active);
      if (active != 0) {
        const bool is_full = count == kResident && j0 >= keys.full_begin && j0 + kStreamed <= keys.full_end;
        differentiate(s, dp, p, visible(a, geometry, is_full, b, h, i0, j0), kept(a, p.constants, b, h, i0, j0),
                      (static_cast<int64_t>(b) * a.Hq + h) * a.Lq, i0);
        store_weights(s);
      }
#pragma unroll 1
      for (int d0 = 0; d0 < a.D; d0 += kColumns) {
        sync_block();                                         // what the buffers held has been used by all
        const bool is_far = load_pair(q, k, a.dtype, w, d0);  // and dS is there
        if (active == 0) continue;
        if (is_far) {
          add_gradients<4, true>(dq, dw, width, d0, k.count);
        } else if (active == 4) {
          add_gradients<4, false>(dq, dw, width, d0, k.count);
        } else {
          add_gradients<1, false>(dq, dw, width, d0, k.count);
        }
      }
    }

    sync_block();  // all sums are done
    write_sums(dq, width, w, 4.0f, a.dtype, p.grad.dq, p.grad.dq_stride, b, h, i0, count, a.D, p.is_aligned_dq);
    float* const part = p.dw_parts + (static_cast<int64_t>(bh) * p.row_blocks + row_block) * a.D;
    for (int d = thread_index(); d < a.D; d += kThreads) {
      float sum = 0.0f;
      for (int row = 0; row < 2 * kWarps; ++row) {
        sum += load_shared_f32(dw + static_cast<SharedAddress>((row * width + d) * 4));
      }
      part[d] = -2.0f * sum;
    }
  }

  // dP, of all rows that `active` has.
  FASTATTN_DEVICE void products(float (&dp)[4][4], const AdditiveRows& d_o, const AdditiveRows& v, DType type,
                                int active) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) dp[r][c] = 0.0f;
    }
#pragma unroll 1
    for (int d0 = 0; d0 < v.columns; d0 += kColumns) {
      sync_block();  // what the buffers held has been used by all
      load_both(d_o, v, type, d0, false);
      sync_block();  // the columns have arrived
      if (active == 4) {
        add_products<4>(dp, step_columns(v.columns, d0));
      } else if (active == 1) {
        add_products<1>(dp, step_columns(v.columns, d0));
      }
    }
  }

  // Scores become dS. first: the head's first row among all rows.
  FASTATTN_DEVICE void differentiate(float (&s)[4][4], const float (&dp)[4][4], const Params& p, uint32_t visible,
                                     uint32_t kept, int64_t first, int i0) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const RowStatistics row = load_statistics(p.row_stats + first, i0 + resident_row(r), p.grad.forward.Lq);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t bit = 1u << (4 * r + c);
        const float weight = exp2_approx((s[r][c] - row.m) * kLog2E) * row.inverse_l;
        s[r][c] = visible & bit ? weight_gradient(weight, kept & bit ? dp[r][c] : 0.0f, row) : 0.0f;
      }
    }
  }

  template <int kRows, bool kIsFar>
  FASTATTN_DEVICE void add_gradients(SharedAddress dq, SharedAddress dw, int width, int d0, int keys) {
    constexpr F32x4 kOnes = {{1.0f, 1.0f, 1.0f, 1.0f}};
    float sums[kRows][4], dw_sums[4];
    gradient_sums<kRows, kIsFar, true>(sums, dw_sums, keys);
#pragma unroll
    for (int r = 0; r < kRows; ++r) update_cell(cell(dq, width, resident_row(r), d0), 1.0f, sums[r], kOnes);
    update_cell(cell(dw, width, 2 * warp() + group(), d0), 1.0f, dw_sums, kOnes);
  }
};

// One CTA = kResident keys of one (batch, key head); it walks over the query rows that see any of them, of all the
// query heads that share the key head, one after the other. dk and dv.
struct AdditiveBackwardKeysKernel : AdditiveBlock<false> {
  using Params = AdditiveBackwardParams;
  static constexpr const char* kName = "additive_backward_dk_dv";
  static constexpr int kMinBlocks = 2;
  // dk, then dv.
  static constexpr int kSharedBytes = additive_shared_bytes(kResident, 2 * kMaxHeadDim);  // at most
  static int shared_bytes(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    return additive_shared_bytes(kResident, divide_up(a.D, kColumns) * kColumns + a.Dv);
  }
  static_assert(kSharedBytes <= 99 * 1024);

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const int cta = static_cast<int>(block_index()), bh = cta / p.key_blocks;
    const int b = bh / static_cast<int>(a.Hkv), hkv = bh % static_cast<int>(a.Hkv);
    const int j0 = cta % p.key_blocks * kResident;
    const int group_heads = static_cast<int>(a.Hq / a.Hkv);

    const MaskGeometry geometry = mask_geometry(a, b);
    const int Lk = static_cast<int>(geometry.Lk), j1 = j0 + kResident < Lk ? j0 + kResident : Lk;
    TileRange range = {};
    if (j0 < j1) range = row_range(geometry, j0, j1);
    const int m_begin = static_cast<int>(range.begin) / kStreamed;
    const int m_end = range.end > range.begin ? static_cast<int>((range.end + kStreamed - 1) / kStreamed) : m_begin;
    const int steps = group_heads * (m_end - m_begin);

    const int dk_width = padded(a.D), dv_width = padded(a.Dv);
    const SharedAddress dk = shared_base() + kSumsAt, dv = dk + static_cast<SharedAddress>(kResident * dk_width * 4);
    clear_cells(dk, dk_width);
    clear_cells(dv, dv_width);
    const AdditiveRows k = additive_rows(a.k, a.k_stride, a.dtype, b, hkv, j0, j1, a.D, p.is_aligned_k);
    const AdditiveRows v = additive_rows(a.v, a.v_stride, a.dtype, b, hkv, j0, j1, a.Dv, p.is_aligned_v);

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int h = hkv * group_heads + step / (m_end - m_begin);
      const int i0 = (m_begin + step % (m_end - m_begin)) * kStreamed;
      const AdditiveRows q = additive_rows(a.q, a.q_stride, a.dtype, b, h, i0, a.Lq, a.D, p.is_aligned_q);
      const AdditiveRows d_o =
          additive_rows(p.grad.d_o, p.grad.d_o_stride, a.dtype, b, h, i0, a.Lq, a.Dv, p.is_aligned_d_o);
      const void* w = static_cast<const char*>(a.w) + h * a.w_stride * element_bytes(a.dtype);
      const F32x4* row_stats = p.row_stats + (static_cast<int64_t>(b) * a.Hq + h) * a.Lq;
      float s[4][4], dp[4][4];
      scores(s, k, q, a.dtype, w, 4);
      const bool is_full = j0 + kResident <= Lk && i0 >= range.full_begin && i0 + kStreamed <= range.full_end;
      const uint32_t are_visible = visible(a, geometry, is_full, b, h, i0, j0);
      const uint32_t are_kept = kept(a, p.constants, b, h, i0, j0);
      weigh(s, dp, row_stats, are_visible, are_kept, i0, a.Lq);
      store_weights(dp);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) dp[r][c] = 0.0f;
      }
#pragma unroll 1
      for (int d0 = 0; d0 < a.Dv; d0 += kColumns) {
        sync_block();  // what the buffers held has been used by all; the weights are there
        load_both(v, d_o, a.dtype, d0, false);
        sync_block();  // the columns have arrived
        add_products<4>(dp, step_columns(a.Dv, d0));
        float sums[4][4];
        weighted_sums<4>(sums, d_o.count);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          update_cell(cell(dv, dv_width, resident_row(r), d0), 1.0f, sums[r], {{1.0f, 1.0f, 1.0f, 1.0f}});
        }
      }
      differentiate(s, dp, row_stats, are_visible, are_kept, i0, a.Lq);
      sync_warp();  // the warp has used the weights, in whose place dS comes
      store_weights(s);
#pragma unroll 1
      for (int d0 = 0; d0 < a.D; d0 += kColumns) {
        sync_block();                                         // what the buffers held has been used by all
        const bool is_far = load_pair(k, q, a.dtype, w, d0);  // and dS is there
        if (is_far) {
          add_gradients<true>(dk, dk_width, d0, q.count);
        } else {
          add_gradients<false>(dk, dk_width, d0, q.count);
        }
      }
    }

    sync_block();                                   // all sums are done
    const int count = static_cast<int>(a.Lk) - j0;  // keys that kv_lengths leaves out have a gradient as well: 0
    write_sums(dk, dk_width, nullptr, 1.0f, a.dtype, p.grad.dk, p.grad.dk_stride, b, hkv, j0, count, a.D,
               p.is_aligned_dk);
    write_sums(dv, dv_width, nullptr, p.constants.keep_scale, a.dtype, p.grad.dv, p.grad.dv_stride, b, hkv, j0, count,
               a.Dv, p.is_aligned_dv);
  }

  // Scores become weights; z, the weights as dropout leaves them (not yet divided by 1 - p).
  FASTATTN_DEVICE void weigh(float (&s)[4][4], float (&z)[4][4], const F32x4* row_stats, uint32_t visible,
                             uint32_t kept, int i0, int64_t Lq) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const RowStatistics row = load_statistics(row_stats, i0 + 4 * place() + c, Lq);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t bit = 1u << (4 * r + c);
        const float weight = exp2_approx((s[r][c] - row.m) * kLog2E) * row.inverse_l;
        s[r][c] = visible & bit ? weight : 0.0f;
        z[r][c] = kept & bit ? s[r][c] : 0.0f;
      }
    }
  }

  // Weights become dS.
  FASTATTN_DEVICE void differentiate(float (&s)[4][4], const float (&dp)[4][4], const F32x4* row_stats,
                                     uint32_t visible, uint32_t kept, int i0, int64_t Lq) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const RowStatistics row = load_statistics(row_stats, i0 + 4 * place() + c, Lq);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t bit = 1u << (4 * r + c);
        s[r][c] = visible & bit ? weight_gradient(s[r][c], kept & bit ? dp[r][c] : 0.0f, row) : 0.0f;
      }
    }
  }

  template <bool kIsFar>
  FASTATTN_DEVICE void add_gradients(SharedAddress dk, int width, int d0, int rows) {
    float sums[4][4], unused[4];
    gradient_sums<4, kIsFar, false>(sums, unused, rows);
    // Heads may have a w of their own, so that it is a factor here.
    F32x4 slope = load_shared_f32x4(shared_base() + static_cast<SharedAddress>(kWAt + 16 * place()));
#pragma unroll
    for (int e = 0; e < 4; ++e) slope.x[e] *= 4.0f;
#pragma unroll
    for (int r = 0; r < 4; ++r) update_cell(cell(dk, width, resident_row(r), d0), 1.0f, sums[r], slope);
  }
};

// The parts of dw, added up in order. One CTA = 32 columns of one head's, or of all heads' where they share w; each
// warp adds up every kWarps-th part, and the first one what the warps have.
struct AdditiveWeightGradientKernel {
  using Params = AdditiveBackwardParams;
  static constexpr const char* kName = "additive_backward_dw";
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = kThreads * 4;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.grad.forward;
    const int column_blocks = static_cast<int>((a.D + 31) / 32), cta = static_cast<int>(block_index());
    const int h = cta / column_blocks, d = cta % column_blocks * 32 + (thread_index() & 31), warp = thread_index() >> 5;
    const int heads = a.w_stride == 0 ? 1 : static_cast<int>(a.Hq);
    const int run = heads == 1 ? static_cast<int>(a.Hq) * p.row_blocks : p.row_blocks;  // of parts that are neighbours
    const int parts = run * static_cast<int>(a.B);
    // Part n of the head.
    const auto part = [&](int n) {
      return p.dw_parts[(static_cast<int64_t>(n / run * heads + h) * run + n % run) * a.D + d];
    };
    float sum = 0.0f;
    if (d < a.D) {
      // By blocks, whose sums are added: one long sum over a large batch would lose more than float32 has to.
      for (int n = warp; n < parts;) {
        const int end = parts - n < 32 * kWarps ? parts : n + 32 * kWarps;
        float block = 0.0f;
#pragma unroll 4
        for (; n < end; n += kWarps) block += part(n);
        sum += block;
      }
    }
    const SharedAddress sums = shared_base();
    store_shared_f32(sums + static_cast<SharedAddress>(thread_index() * 4), sum);
    sync_block();  // the warps' sums have arrived
    if (warp != 0 || d >= a.D) return;
    float total = 0.0f;
    for (int n = 0; n < kWarps; ++n) {
      total += load_shared_f32(sums + static_cast<SharedAddress>((32 * n + thread_index()) * 4));
    }
    static_cast<float*>(p.grad.dw)[h * a.D + d] = total;
  }
};

}  // namespace fastattn::cuda
