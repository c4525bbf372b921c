// The two matrix products of attention, for one warp: everything that the kernels multiply is one of them.
//
//   gemm_nt:  acc[m, n] += sum_d A[m, d] B[n, d]   A and B tiles in shared memory             (scores: q k^T, do v^T)
//   gemm_rn:  acc[m, d] += sum_n P[m, n] B[n, d]   P in registers, as gemm_nt leaves it        (outputs: p v, ds k)
//
// 16-bit operands: mma.m16n8k16, accumulated in float. What an accumulator tile holds, rounded and packed, is the A
// operand of the next product as it stands, so that P never goes through shared memory.
//
// float32 operands: mma.m16n8k8 in TF32, three times. x = hi + lo with eleven significant bits each; hi hi + hi lo +
// lo hi leaves out lo lo, of relative size 2^-22. An infinite operand has no rest, and its products are NaN. A k-step
// of both kinds is 32 bytes of a row, so that one addressing serves them. In gemm_rn a lane holds keys 2t and 2t + 1
// where the TF32 A operand wants columns t and t + 4: the sum over keys has no order, so column t is taken to mean key
// 2t, column t + 4 key 2t + 1, and B is read accordingly.
//
// acc[i][j][e] is row 16 i + g + 8 (e / 2), column 8 j + 2 t + e % 2 of the warp's part; g = lane / 4, t = lane % 4.
#pragma once

#include "cuda/tile.cuh"

namespace fastattn::cuda {

template <int kM, int kN>
FASTATTN_DEVICE void set_zero(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
    }
  }
}

template <DType kType>
FASTATTN_DEVICE uint32_t pack_pair(float lo, float hi) {
  static_assert(kType == DType::kBFloat16 || kType == DType::kFloat16);
  return kType == DType::kBFloat16 ? pack_bf16(lo, hi) : pack_f16(lo, hi);
}

template <DType kType>
FASTATTN_DEVICE void mma_16bit(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == DType::kBFloat16) {
    mma_bf16(d, a, b0, b1);
  } else {
    mma_f16(d, a, b0, b1);
  }
}

// An operand in two TF32 parts.
template <int kCount>
struct SplitOperand {
  uint32_t hi[kCount], lo[kCount];

  FASTATTN_DEVICE void split(const uint32_t (&bits)[kCount], SplitOperand* out) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float x = bits_float(bits[e]);
      out->hi[e] = to_tf32(x);
      out->lo[e] = to_tf32(x - bits_float(out->hi[e]));
    }
  }
};

// Tensor cores round their sums towards zero, which in a long sum adds up. So only a few products are summed by them,
// and those sums are added by additions that round to nearest: each k-step's in gemm_nt, every second one's in gemm_rn.
// (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical
// peak performance", 2022, section 4.)
//
// kSwapped: a and b have changed places, as q and k do where scores are computed transposed. The products are then
// added in the order that they have in the other kernels, so that a score has the same bits in all.
template <bool kSwapped = false>
FASTATTN_DEVICE void mma_small_tf32(float (&d)[4], const SplitOperand<4>& a, const SplitOperand<2>& b) {
  if constexpr (kSwapped) mma_tf32(d, a.hi, b.lo[0], b.lo[1]);
  mma_tf32(d, a.lo, b.hi[0], b.hi[1]);
  if constexpr (!kSwapped) mma_tf32(d, a.hi, b.lo[0], b.lo[1]);
}
// After all the small ones: what is cut off goes by the sum's size.
FASTATTN_DEVICE void mma_large_tf32(float (&d)[4], const SplitOperand<4>& a, const SplitOperand<2>& b) {
  mma_tf32(d, a.hi, b.hi[0], b.hi[1]);
}
template <bool kSwapped>
FASTATTN_DEVICE void add_3xtf32(float (&d)[4], const SplitOperand<4>& a, const SplitOperand<2>& b) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_small_tf32<kSwapped>(sum, a, b);
  mma_large_tf32(sum, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += sum[e];
}

// a and b are lane addresses: a_fragment_address of the warp's first row, b_fragment_address of the tile. kSwapped: see
// mma_small_tf32.
template <class TileA, class TileB, bool kSwapped = false, int kM, int kN>
FASTATTN_DEVICE void gemm_nt(float (&acc)[kM][kN][4], SharedAddress a, SharedAddress b) {
  static_assert(TileA::kRowBytes == TileB::kRowBytes && kN % 2 == 0);
  constexpr int kSteps = TileA::kRowBytes / 32;
  a = opaque(a), b = opaque(b);
  // Long rows not in full: ptxas then fetches so far ahead that registers run out.
  [[maybe_unused]] constexpr int kUnroll = kSteps <= 4 ? kSteps : kSteps <= 8 ? 2 : 1;
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a_bits[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) ldmatrix_x4(a_bits[i], TileA::at(a + i * 16 * TileA::kRowBytes, 2 * step));
    if constexpr (TileA::kType == DType::kFloat32) {
      SplitOperand<4> a_split[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) SplitOperand<4>::split(a_bits[i], &a_split[i]);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t b_bits[4];
        ldmatrix_x4(b_bits, TileB::at(b + j * 8 * TileB::kRowBytes, 2 * step));
        SplitOperand<4> b_split;
        SplitOperand<4>::split(b_bits, &b_split);
        const SplitOperand<2> first = {{b_split.hi[0], b_split.hi[1]}, {b_split.lo[0], b_split.lo[1]}};
        const SplitOperand<2> second = {{b_split.hi[2], b_split.hi[3]}, {b_split.lo[2], b_split.lo[3]}};
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          add_3xtf32<kSwapped>(acc[i][j], a_split[i], first);
          add_3xtf32<kSwapped>(acc[i][j + 1], a_split[i], second);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t b_bits[4];
        ldmatrix_x4(b_bits, TileB::at(b + j * 8 * TileB::kRowBytes, 2 * step));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_16bit<TileA::kType>(acc[i][j], a_bits[i], b_bits[0], b_bits[1]);
          mma_16bit<TileA::kType>(acc[i][j + 1], a_bits[i], b_bits[2], b_bits[3]);
        }
      }
    }
  }
}

// p is [16 kM, 8 kK], acc [16 kM, 8 kN]; b is bt_fragment_address of a tile of at least 8 kK rows.
template <class TileB, int kM, int kK, int kN>
FASTATTN_DEVICE void gemm_rn(float (&acc)[kM][kN][4], const float (&p)[kM][kK][4], SharedAddress b) {
  static_assert(kK % 2 == 0 && kN % 2 == 0 && 8 * kN <= TileB::kDim && 8 * kK <= TileB::kRows);
  b = opaque(b);
  if constexpr (TileB::kType == DType::kFloat32) {
    SplitOperand<4> a[kM][kK];
#pragma unroll
    for (int step = 0; step < kK; ++step) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const float(&x)[4] = p[i][step];
        const uint32_t bits[4] = {float_bits(x[0]), float_bits(x[2]), float_bits(x[1]), float_bits(x[3])};
        SplitOperand<4>::split(bits, &a[i][step]);
      }
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int pair = 0; pair < kK; pair += 2) {
        float sum[kM][1][4];
        set_zero(sum);
        SplitOperand<2> b_split[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int step = pair + half;
          // Rows 2t and 2t + 1 differ in the lowest bit of the swizzle, hence in the lowest bit of the chunk's place.
          const SharedAddress row = TileB::at(b + step * 8 * TileB::kRowBytes, 2 * j);
          const SharedAddress next_row = (row ^ (TileB::kSwizzleMask & 1) << 4) + TileB::kRowBytes;
          const uint32_t bits[2] = {load_shared_u32(row), load_shared_u32(next_row)};
          SplitOperand<2>::split(bits, &b_split[half]);
#pragma unroll
          for (int i = 0; i < kM; ++i) mma_small_tf32(sum[i][0], a[i][step], b_split[half]);
        }
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_large_tf32(sum[i][0], a[i][pair], b_split[0]);
          mma_large_tf32(sum[i][0], a[i][pair + 1], b_split[1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[i][0][e];
        }
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < kK / 2; ++step) {
      uint32_t a[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float(&x)[4] = p[i][2 * step + half];
          a[i][2 * half] = pack_pair<TileB::kType>(x[0], x[1]);
          a[i][2 * half + 1] = pack_pair<TileB::kType>(x[2], x[3]);
        }
      }
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t b_bits[4];
        ldmatrix_x4_trans(b_bits, TileB::at(b + step * 16 * TileB::kRowBytes, j));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_16bit<TileB::kType>(acc[i][j], a[i], b_bits[0], b_bits[1]);
          mma_16bit<TileB::kType>(acc[i][j + 1], a[i], b_bits[2], b_bits[3]);
        }
      }
    }
  }
}

// Rounds the accumulators of a warp's rows, `row0` on, to the tile's type and puts them into the tile.
template <class Tile, int kM, int kN>
FASTATTN_DEVICE void store_accumulators(const float (&acc)[kM][kN][4], SharedAddress base, int row0) {
  static_assert(8 * kN <= Tile::kDim);
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * i + (lane >> 2) + 8 * half;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float x = acc[i][j][2 * half], y = acc[i][j][2 * half + 1];
        if constexpr (Tile::kType == DType::kFloat32) {
          const SharedAddress at = Tile::chunk_address(base, row, 2 * j + (lane >> 1 & 1)) + (lane & 1) * 8;
          store_shared_f32(at, x);
          store_shared_f32(at + 4, y);
        } else {
          store_shared_u32(Tile::chunk_address(base, row, j) + (lane & 3) * 4, pack_pair<Tile::kType>(x, y));
        }
      }
    }
  }
}

}  // namespace fastattn::cuda
