// Attention with additive scores, forward: o, lse and the row statistics, in one pass over the keys with an online
// softmax (forward.cuh has the formulas and the papers; additive.cuh those of the scores).
//
// One CTA = kResident rows of one (batch, head), and with splits one part of their keys; what the parts leave is
// forward.cuh's, and combine.cuh merges it. For each tile of keys: scores, step by step over D; weights, which go
// through shared memory, for a lane needs those of the other lanes; weighted sums of v, step by step over Dv.
#pragma once

#include "cuda/additive.cuh"
#include "cuda/finish.cuh"
#include "cuda/forward.cuh"

namespace fastattn::cuda {

struct AdditiveForwardKernel : AdditiveBlock<true> {
  using Params = ForwardParams;
  static constexpr const char* kName = "additive_forward";
  static constexpr int kMinBlocks = kAdditiveForwardBlocks;
  // o, not yet divided by anything.
  static constexpr int kSharedBytes = additive_shared_bytes(kResident, kMaxHeadDim);  // at most
  static int shared_bytes(const Params& p) { return additive_shared_bytes(kResident, p.attention.Dv); }
  static_assert(kSharedBytes <= 99 * 1024);

  // Of the lane's rows. l is the sum over its own keys until finish() adds up the lanes'.
  struct Rows {
    float m[4], l[4];
  };

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.attention;
    // As in forward.cuh: neighbours share their keys, and those with the most keys start first.
    int64_t block = block_index();
    const int i0 = (p.row_blocks - 1 - static_cast<int>(block % p.row_blocks)) * kResident;
    block /= p.row_blocks;
    const int split = static_cast<int>(block % p.splits);
    block /= p.splits;
    const int b = static_cast<int>(block / a.Hq), h = static_cast<int>(block % a.Hq);
    const int hkv = h / static_cast<int>(a.Hq / a.Hkv);

    const int left = static_cast<int>(a.Lq) - i0, count = left < kResident ? left : kResident;
    const int active = active_rows(count);
    const MaskGeometry geometry = mask_geometry(a, b);
    const TileRange keys = key_range(geometry, i0, i0 + count);
    const auto [n_begin, n_end] = tiles_of_split<kStreamed>(keys, split, p.splits);

    const SharedAddress sums = shared_base() + kSumsAt;
    const int width = padded(a.Dv);
    clear_cells(sums, width);
    Rows state;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      state.m[r] = -kInfinity;
      state.l[r] = 0.0f;
    }
    const void* w = static_cast<const char*>(a.w) + h * a.w_stride * element_bytes(a.dtype);

#pragma unroll 1
    for (int n = n_begin; n < n_end; ++n) {
      const int j0 = n * kStreamed;
      float s[4][4], rescale[4];
      scores(s, additive_rows(a.q, a.q_stride, a.dtype, b, h, i0, i0 + count, a.D, p.is_aligned_q),
             additive_rows(a.k, a.k_stride, a.dtype, b, hkv, j0, geometry.Lk, a.D, p.is_aligned_k), a.dtype, w, active);
      // By warps without rows as well: shuffles want to be where nobody can have turned off.
      const bool is_full = count == kResident && j0 >= keys.full_begin && j0 + kStreamed <= keys.full_end;
      hide(s, visible(a, geometry, is_full, b, h, i0, j0));
      update_softmax(s, rescale, state);
      drop(s, kept(a, p.constants, b, h, i0, j0));
      store_weights(s);
      const AdditiveRows values =
          additive_rows(a.v, a.v_stride, a.dtype, b, hkv, j0, geometry.Lk, a.Dv, p.is_aligned_v);
#pragma unroll 1
      for (int d0 = 0; d0 < a.Dv; d0 += kColumns) {
        sync_block();  // what the buffer held has been used by all; the weights are there
        load_streamed(values, a.dtype, d0);
        sync_block();  // the values have arrived
        if (active == 4) {
          add_values<4>(sums, width, d0, rescale, values.count);
        } else if (active == 1) {
          add_values<1>(sums, width, d0, rescale, values.count);
        }
      }
    }

    finish(state);
    if (p.splits > 1) {
      write_partial(sums, width, state, p, b, h, i0, count, split);
    } else {
      write_results(sums, width, state, p, b, h, i0, count);
    }
  }

  FASTATTN_DEVICE void hide(float (&s)[4][4], uint32_t visible) {
    if (visible == 0xffffu) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!(visible >> (4 * r + c) & 1u)) s[r][c] = -kInfinity;
      }
    }
  }

  FASTATTN_DEVICE void drop(float (&weights)[4][4], uint32_t kept) {
    if (kept == 0xffffu) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!(kept >> (4 * r + c) & 1u)) weights[r][c] = 0.0f;
      }
    }
  }

  // A NaN is larger than everything: it must reach the row's results.
  FASTATTN_DEVICE float larger(float x, float y) { return y > x || y != y ? y : x; }

  // Scores become weights relative to the new maximum; `rescale` brings to it what was summed so far.
  FASTATTN_DEVICE void update_softmax(float (&s)[4][4], float (&rescale)[4], Rows& state) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float m = state.m[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) m = larger(m, s[r][c]);
#pragma unroll
      for (int distance = 1; distance < 16; distance *= 2) m = larger(m, shuffle_xor(m, distance));
      // m = -inf: the row has seen nothing. Any finite number does as a base then, and -inf itself would give NaN.
      const float base = m == -kInfinity ? 0.0f : m;
      rescale[r] = exp2_approx((state.m[r] - base) * kLog2E);
      state.m[r] = m;
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        // The maximum's own weight is 1 exactly: see AttentionParams::row_sum.
        s[r][c] = exp2_approx((s[r][c] - base) * kLog2E);
        sum += s[r][c];
      }
      state.l[r] = multiply_add(state.l[r], rescale[r], sum);
    }
  }

  template <int kRows>
  FASTATTN_DEVICE void add_values(SharedAddress sums, int width, int d0, const float (&rescale)[4], int keys) {
    float values[kRows][4];
    weighted_sums<kRows>(values, keys);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      update_cell(cell(sums, width, resident_row(r), d0), rescale[r], values[r], {{1.0f, 1.0f, 1.0f, 1.0f}});
    }
  }

  FASTATTN_DEVICE void finish(Rows& state) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int distance = 1; distance < 16; distance *= 2) state.l[r] += shuffle_xor(state.l[r], distance);
    }
  }

  FASTATTN_DEVICE void write_partial(SharedAddress sums, int width, const Rows& state, const Params& p, int b, int h,
                                     int i0, int count, int split) {
    const AttentionParams& a = p.attention;
    const int64_t first = ((static_cast<int64_t>(split) * a.B + b) * a.Hq + h) * a.Lq + i0;
    const float factor[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    const int64_t stride[3] = {0, 0, a.Dv};
    write_cells(sums, width, factor, p.partial_o + first * a.Dv, stride, DType::kFloat32, 0, 0, 0, count,
                static_cast<int>(a.Dv), a.Dv % 4 == 0);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (resident_row(r) < count && place() == 0) {
        p.partial_m[first + resident_row(r)] = state.m[r];
        p.partial_l[first + resident_row(r)] = state.l[r];
      }
    }
  }

  FASTATTN_DEVICE void write_results(SharedAddress sums, int width, const Rows& state, const Params& p, int b, int h,
                                     int i0, int count) {
    const AttentionParams& a = p.attention;
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const FinishedRow row = finish_row(a, {state.m[r], state.l[r]}, h);
      factor[r] = row.factor * p.constants.keep_scale;
      if (resident_row(r) < count && place() == 0) {
        write_statistics(a, row, (static_cast<int64_t>(b) * a.Hq + h) * a.Lq + i0 + resident_row(r));
      }
    }
    write_cells(sums, width, factor, a.o, a.o_stride, a.dtype, b, h, i0, count, static_cast<int>(a.Dv), p.is_aligned_o);
  }

  // Writes the lane's cells to rows first + resident_row of a tensor, times `factor` by row, as far as there are
  // `count` rows.
  FASTATTN_DEVICE void write_cells(SharedAddress base, int width, const float (&factor)[4], void* tensor,
                                   const int64_t (&stride)[3], DType type, int b, int h, int first, int count,
                                   int columns, bool is_aligned) {
    char* const out =
        static_cast<char*>(tensor) + (b * stride[0] + h * stride[1] + first * stride[2]) * element_bytes(type);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = resident_row(r);
      if (row >= count) continue;
#pragma unroll 1
      for (int d0 = 0; d0 + 4 * place() < columns; d0 += kColumns) {
        F32x4 x = load_shared_f32x4(cell(base, width, row, d0));
#pragma unroll
        for (int e = 0; e < 4; ++e) x.x[e] *= factor[r];
        store_columns(out + row * stride[2] * element_bytes(type), type, d0 + 4 * place(), columns, x, is_aligned);
      }
    }
  }
};

}  // namespace fastattn::cuda
