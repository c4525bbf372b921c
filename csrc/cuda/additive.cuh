// Additive scores (Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate",
// 2015, appendix A.1.2), and what flows back through them: what the kernels of both passes share.
//
//   s_ij  = sum_d w_d t_ijd       t = tanh(q_id + k_jd)
//   dq_id = w_d sum_j dS_ij (1 - t^2)      dk_jd = w_d sum_i dS_ij (1 - t^2)      dw_d = sum_ij dS_ij t_ijd
//
// With E_q = e^(2q), E_k = e^(2k), computed as a number comes into shared memory, and u = 1 / (1 + E_q E_k):
//
//   t = -2 (u - 1/2)       1 - t^2 = 4 (1/4 - (u - 1/2)^2) = 4 (u - u^2)
//
// A multiprocessor has 128 multiply-adds a cycle, but 16 reciprocals, so that two of them share one:
//
//   w1 / a + w2 / b = (w1 b + w2 a) / (a b)
//
// E and the product of two must neither overflow nor be clamped where it counts. q and k are limited to kFar, which
// changes nothing as long as one of the two is at most kNear: beyond kFar - kNear = 9.25, tanh is 1 but for less than
// half an ulp. Where columns of a tile go further on both sides, their exponentials are taken one by one, of q + k.
//
// There are no tensor cores in this: a score costs D divisions. Arithmetic is in float32, and what a number was stored
// as is a branch where it is loaded, so that one kernel serves all dtypes. D and Dv are counted at run time, in steps
// of kColumns.
//
// A block of kResident rows stays, and tiles of kStreamed rows of the other side pass by: keys that pass by query rows
// (kRowsStay: forward, dq), or query rows that pass by keys (dk and dv). A warp owns kWarpRows of the resident rows. Of
// the scores between these and a tile, a lane has those of four by four: residents r = 0..3 and streamed rows 4 place
// to 4 place + 3. So the softmax, and a sum over streamed rows, stay within a warp.
//
// Not handled: scale, softcap, bias and ALiBi, which additive scores do not have.
#pragma once

#include <math.h>

#include "cuda/heuristics.h"
#include "cuda/rows.cuh"
#include "cuda/score.cuh"

namespace fastattn::cuda {

// 4 (kNear + kFar) = 86 < log(FLT_MAX), and the reciprocal of e^86 is still a normal number.
constexpr float kAdditiveNear = 6.125f, kAdditiveFar = 15.375f;

// Rows of one (batch, head) of a tensor, from one on.
struct AdditiveRows {
  const char* first;
  int64_t row_bytes;
  int count;  // of the rows that exist; the others are not read, and count as 0
  int columns;
  bool is_whole;  // four columns at a time are aligned, and never past the last
};

FASTATTN_DEVICE int element_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

FASTATTN_DEVICE AdditiveRows additive_rows(const void* tensor, const int64_t (&stride)[3], DType type, int b, int h,
                                           int first, int64_t end, int64_t columns, bool is_aligned) {
  const int64_t at = b * stride[0] + h * stride[1] + first * stride[2];
  return {static_cast<const char*>(tensor) + at * element_bytes(type), stride[2] * element_bytes(type),
          static_cast<int>(end) - first, static_cast<int>(columns), is_aligned && columns % 4 == 0};
}

// e^(2x), of x limited to kFar. A NaN stays one, which fmin and fmax would take for the limit.
FASTATTN_DEVICE float exponentiated(float x) {
  x = x > kAdditiveFar ? kAdditiveFar : x;
  x = x < -kAdditiveFar ? -kAdditiveFar : x;
  return expf(x + x);
}

// u of q and k themselves. Any of them: e^inf is inf, and its reciprocal 0.
FASTATTN_DEVICE float additive_u_directly(float q, float k) {
  return reciprocal_approx(1.0f + exp2_approx((q + k) * (2.0f * kLog2E)));
}

FASTATTN_DEVICE float widened(DType type, uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  return type == DType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

// Columns [column, column + 4) of a row, as far as there are `columns`.
FASTATTN_DEVICE void store_columns(void* row, DType type, int column, int columns, F32x4 x, bool is_aligned) {
  char* const to = static_cast<char*>(row) + column * element_bytes(type);
  const bool is_whole = is_aligned && column + 4 <= columns;
  if (type == DType::kFloat32) {
    if (is_whole) {
      store_global_u32x4(to, {{float_bits(x.x[0]), float_bits(x.x[1]), float_bits(x.x[2]), float_bits(x.x[3])}});
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + e < columns) reinterpret_cast<float*>(to)[e] = x.x[e];
      }
    }
    return;
  }
  const bool is_bf16 = type == DType::kBFloat16;
  const U32x2 packed = {{is_bf16 ? pack_bf16(x.x[0], x.x[1]) : pack_f16(x.x[0], x.x[1]),
                         is_bf16 ? pack_bf16(x.x[2], x.x[3]) : pack_f16(x.x[2], x.x[3])}};
  if (is_whole) {
    store_global_u32x2(to, packed);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + e < columns) {
        reinterpret_cast<uint16_t*>(to)[e] = static_cast<uint16_t>(packed.x[e / 2] >> (e % 2 * 16));
      }
    }
  }
}

template <bool kRowsStay>
struct AdditiveBlock {
  static constexpr int kResident = kAdditiveResident, kStreamed = kAdditiveStreamed, kColumns = kAdditiveColumns;
  static constexpr int kWarps = kAdditiveWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = kResident / kWarps;
  static_assert(kWarpRows == 8 && kStreamed == 64, "a lane has four of two groups of rows, and four of sixteen");

  // Shared memory. Rows are an odd number of 16-byte chunks, so that eight neighbours at one column are in different
  // banks. Row j of a streamed tile is at place j / 4 + 16 (j % 4): lanes whose rows are four apart read neighbours.
  static constexpr int kRowBytes = (kColumns + 4) * 4;
  static constexpr int kStreamedAt = kResident * kRowBytes;
  static constexpr int kWAt = kStreamedAt + kStreamed * kRowBytes;  // [kColumns] of w
  static constexpr int kFlagsAt = kWAt + kColumns * 4;              // [kWarps]: what lies beyond kNear, see load_pair()
  static constexpr int kWeightsAt = kFlagsAt + kWarps * 4;          // [kWarps][kStreamed][kWarpRows]: weights, or dS
  static constexpr int kWarpWeightBytes = kStreamed * kWarpRows * 4;
  static constexpr int kSumsAt = kWeightsAt + kWarps * kWarpWeightBytes;  // the kernel's own sums, see cells()

  static_assert(kSumsAt == additive_shared_bytes(0, 0));

  // Computed where they are used, as in tile.cuh.
  FASTATTN_DEVICE int thread() { return static_cast<int>(opaque(static_cast<uint32_t>(thread_index()))); }
  FASTATTN_DEVICE int warp() { return thread() >> 5; }
  FASTATTN_DEVICE int group() { return thread() >> 4 & 1; }
  FASTATTN_DEVICE int place() { return thread() & 15; }

  // Number r of a lane's resident rows. Query rows alternate between the groups, so that two rows are the first of
  // each: see active_rows(). Keys are neighbours, on which dropout decides at once.
  FASTATTN_DEVICE int resident_row(int r) {
    return kWarpRows * warp() + (kRowsStay ? group() + 2 * r : 4 * group() + r);
  }

  // How many of a lane's four resident query rows there is work for, where the block has `count` of them: 0 for a warp
  // that has none; 1 where a decoder asks for a row or two, which would otherwise cost as much as eight.
  FASTATTN_DEVICE int active_rows(int count) {
    const int left = count - kWarpRows * warp();
    return left <= 0 ? 0 : left <= 2 ? 1 : 4;
  }

  FASTATTN_DEVICE int padded(int64_t columns) {
    return static_cast<int>((columns + kColumns - 1) / kColumns * kColumns);
  }
  // Of the columns from d0 on, those in a step, in whole chunks: what is beyond the last of them is 0.
  FASTATTN_DEVICE int step_columns(int64_t columns, int d0) {
    const int left = static_cast<int>(columns) - d0;
    return left < kColumns ? (left + 3) / 4 * 4 : kColumns;
  }

  // ---- From global to shared memory ---------------------------------------------------------------------------------

  // kColumns columns from d0 on of kResident rows, those from `first` on; zeros, or their exponentials, where there are
  // none. By all threads. streams: to the place of the streamed tile. Returns whether one of this thread's numbers lies
  // beyond kNear.
  FASTATTN_DEVICE bool load(const AdditiveRows& rows, DType type, int d0, bool exponentiates, bool streams, int first) {
    constexpr int kChunks = kColumns / 4, kRowsPerPass = kThreads / kChunks, kPasses = kResident / kRowsPerPass;
    const int chunk = thread() % kChunks, row0 = first + thread() / kChunks;
    const int left = rows.columns - d0 - 4 * chunk;  // columns from this chunk on
    const char* src = rows.first + row0 * rows.row_bytes + (d0 + 4 * chunk) * element_bytes(type);
    const int64_t step = kRowsPerPass * rows.row_bytes;
    F32x4 x[kPasses];
    if (rows.is_whole) {
      // Copies first, and a look at them after: they wait for memory together.
      if (type == DType::kFloat32) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          U32x4 bits = {{0, 0, 0, 0}};
          if (left > 0 && row0 + pass * kRowsPerPass < rows.count) bits = load_global_u32x4(src + pass * step);
          x[pass] = {{bits_float(bits.x[0]), bits_float(bits.x[1]), bits_float(bits.x[2]), bits_float(bits.x[3])}};
        }
      } else {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          U32x2 bits = {{0, 0}};
          if (left > 0 && row0 + pass * kRowsPerPass < rows.count) bits = load_global_u32x2(src + pass * step);
          x[pass] = {{widened(type, bits.x[0]), widened(type, bits.x[0] >> 16), widened(type, bits.x[1]),
                      widened(type, bits.x[1] >> 16)}};
        }
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool exists = row0 + pass * kRowsPerPass < rows.count && e < left;
          x[pass].x[e] = exists ? load_as_float(src + pass * step, type, e) : 0.0f;
        }
      }
    }
    bool is_far = false;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        is_far = is_far || fabsf(x[pass].x[e]) > kAdditiveNear;
        if (exponentiates) x[pass].x[e] = exponentiated(x[pass].x[e]);
      }
      const int row = row0 + pass * kRowsPerPass;
      const int at = streams ? row / 4 + 16 * (row % 4) : row;
      store_shared_f32x4(
          shared_base() + static_cast<SharedAddress>((streams ? kStreamedAt : 0) + at * kRowBytes + chunk * 16),
          x[pass]);
    }
    return is_far;
  }

  // A tile that passes by, as it is; the buffer is ready after the next barrier.
  FASTATTN_DEVICE void load_streamed(const AdditiveRows& rows, DType type, int d0) {
#pragma unroll 1
    for (int first = 0; first < kStreamed; first += kResident) load(rows, type, d0, false, true, first);
  }
  // Rows that stay as well. Returns bit 0 for numbers of theirs beyond kNear, bit 1 for such of the tile's.
  FASTATTN_DEVICE uint32_t load_both(const AdditiveRows& resident, const AdditiveRows& streamed, DType type, int d0,
                                     bool exponentiates) {
    uint32_t far = 0;
#pragma unroll 1
    for (int first = -kResident; first < kStreamed; first += kResident) {
      const bool streams = first >= 0;
      // Field by field: a reference to one or the other would put both into local memory.
      const AdditiveRows rows = {
          streams ? streamed.first : resident.first, streams ? streamed.row_bytes : resident.row_bytes,
          streams ? streamed.count : resident.count, resident.columns, streams ? streamed.is_whole : resident.is_whole};
      const bool is_far = load(rows, type, d0, exponentiates, streams, streams ? first : 0);
      if (is_far) far |= streams ? 2u : 1u;
    }
    return far;
  }

  // q and k, whichever stays, as exponentials; or as they are, where both sides have numbers beyond kNear, and then
  // returns true. w is that of the head. The buffers are free before, and ready after it.
  FASTATTN_DEVICE bool load_pair(const AdditiveRows& resident, const AdditiveRows& streamed, DType type, const void* w,
                                 int d0) {
    if (thread() < kColumns) {
      const int d = d0 + thread();
      store_shared_f32(shared_base() + static_cast<SharedAddress>(kWAt + 4 * thread()),
                       d < resident.columns ? load_as_float(w, type, d) : 0.0f);
    }
#pragma unroll 1
    for (bool exponentiates = true;; exponentiates = false) {
      uint32_t far = load_both(resident, streamed, type, d0, exponentiates);
      if (exponentiates) {
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) far |= shuffle_xor(far, distance);
        if ((thread() & 31) == 0) {
          store_shared_u32(shared_base() + static_cast<SharedAddress>(kFlagsAt + 4 * warp()), far);
        }
      }
      sync_block();  // the columns have arrived, and every warp's word on how far they go
      if (!exponentiates) return true;
      const U32x4 flags = load_shared_u32x4(shared_base() + kFlagsAt);
      if ((flags.x[0] | flags.x[1] | flags.x[2] | flags.x[3]) != 3u) return false;
      // Once more: each thread writes where it wrote before, and nobody has read that.
    }
  }

  FASTATTN_DEVICE SharedAddress resident_address(int r) {
    return shared_base() + static_cast<SharedAddress>(resident_row(r) * kRowBytes);
  }
  // Of the lane's streamed row 4 place + c.
  FASTATTN_DEVICE SharedAddress streamed_address(int c) {
    return shared_base() + static_cast<SharedAddress>(kStreamedAt + (place() + 16 * c) * kRowBytes);
  }

  // ---- Scores -------------------------------------------------------------------------------------------------------

  // Adds w_d (u - 1/2) over a step's columns. The centre of four columns is taken off before their u are added: sums of
  // small scores stay small.
  template <int kRows>
  FASTATTN_DEVICE void add_scores(float (&sums)[4][4], int columns) {
    const SharedAddress w_base = shared_base() + kWAt;
#pragma unroll 1
    for (int d = 0; d < columns; d += 4) {
      const SharedAddress offset = static_cast<SharedAddress>(4 * d);
      const F32x4 w = load_shared_f32x4(w_base + offset);
      const float centre = 0.5f * ((w.x[0] + w.x[1]) + (w.x[2] + w.x[3]));
      F32x4 x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r] = load_shared_f32x4(resident_address(r) + offset);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const F32x4 y = load_shared_f32x4(streamed_address(c) + offset);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float sum = sums[r][c] - centre;
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const float a = multiply_add(x[r].x[e], y.x[e], 1.0f), b = multiply_add(x[r].x[e + 1], y.x[e + 1], 1.0f);
            const float numerator = multiply_add(w.x[e + 1], a, w.x[e] * b);
            sum = multiply_add(numerator, reciprocal_approx(a * b), sum);
          }
          sums[r][c] = sum;
        }
      }
    }
  }

  // The same of q and k as they are.
  FASTATTN_DEVICE void add_scores_directly(float (&sums)[4][4], int columns) {
    const SharedAddress w_base = shared_base() + kWAt;
#pragma unroll 1
    for (int d = 0; d < columns; d += 4) {
      const SharedAddress offset = static_cast<SharedAddress>(4 * d);
      const F32x4 w = load_shared_f32x4(w_base + offset);
      F32x4 x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) x[r] = load_shared_f32x4(resident_address(r) + offset);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const F32x4 y = load_shared_f32x4(streamed_address(c) + offset);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float u = additive_u_directly(x[r].x[e], y.x[e]);
            sums[r][c] = multiply_add(w.x[e], u - 0.5f, sums[r][c]);
          }
        }
      }
    }
  }

  // All scores of the lane; those of rows that `active` leaves out are 0.
  FASTATTN_DEVICE void scores(float (&s)[4][4], const AdditiveRows& resident, const AdditiveRows& streamed, DType type,
                              const void* w, int active) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[r][c] = 0.0f;
    }
#pragma unroll 1
    for (int d0 = 0; d0 < resident.columns; d0 += kColumns) {
      sync_block();  // what the buffers held has been used by all
      const bool is_far = load_pair(resident, streamed, type, w, d0);
      const int columns = step_columns(resident.columns, d0);
      if (active == 0) continue;
      if (is_far) {
        add_scores_directly(s, columns);
      } else if (active == 4) {
        add_scores<4>(s, columns);
      } else {
        add_scores<1>(s, columns);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[r][c] *= -2.0f;
    }
  }

  // Adds the products of resident and streamed rows over a step's columns.
  template <int kRows>
  FASTATTN_DEVICE void add_products(float (&sums)[4][4], int columns) {
#pragma unroll 1
    for (int d = 0; d < columns; d += 4) {
      const SharedAddress offset = static_cast<SharedAddress>(4 * d);
      F32x4 x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) x[r] = load_shared_f32x4(resident_address(r) + offset);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const F32x4 y = load_shared_f32x4(streamed_address(c) + offset);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[r][c] = multiply_add(x[r].x[e], y.x[e], sums[r][c]);
        }
      }
    }
  }

  // ---- Masks: bit 4 r + c stands for resident row r and streamed row c of the lane ----------------------------------

  // Query row and key of the pair (r, c), where the block of rows starts at i0 and that of keys at j0.
  FASTATTN_DEVICE int row_of(int i0, int r, int c) { return i0 + (kRowsStay ? resident_row(r) : 4 * place() + c); }
  FASTATTN_DEVICE int key_of(int j0, int r, int c) { return j0 + (kRowsStay ? 4 * place() + c : resident_row(r)); }

  // Pairs of which the row sees the key. is_full: the interval shows all of them, and all exist.
  FASTATTN_DEVICE uint32_t visible(const AttentionParams& a, const MaskGeometry& geometry, bool is_full, int b, int h,
                                   int i0, int j0) {
    if (is_full && !a.mask) return 0xffffu;
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < 16; ++n) {
      const int i = row_of(i0, n >> 2, n & 3), j = key_of(j0, n >> 2, n & 3);
      const RowInterval seen = row_interval(geometry, i);
      bool is_visible = i < a.Lq && j >= seen.lo && j < seen.hi;
      if (is_visible && a.mask) {
        const int64_t* stride = a.mask_stride;
        is_visible = a.mask[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]] != 0;
      }
      bits |= static_cast<uint32_t>(is_visible) << n;
    }
    return bits;
  }

  // Pairs that dropout keeps. Either the lane's streamed rows or its resident ones are the four keys on which one draw
  // decides.
  FASTATTN_DEVICE uint32_t kept(const AttentionParams& a, const ScoreConstants& constants, int b, int h, int i0,
                                int j0) {
    if (!constants.has_dropout) return 0xffffu;
    const DropoutSeed seed = dropout_seed(a);
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < 4; ++n) {
      const int i = kRowsStay ? row_of(i0, n, 0) : row_of(i0, 0, n), j = key_of(j0, 0, 0);
      const PhiloxWords words = philox4x32(seed.seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                                           static_cast<uint32_t>(b * a.Hq + h), static_cast<uint32_t>(seed.offset));
#pragma unroll
      for (int key = 0; key < 4; ++key) {
        const int bit = kRowsStay ? 4 * n + key : 4 * key + n;
        bits |= static_cast<uint32_t>(words.w[key] >= constants.dropout_threshold) << bit;
      }
    }
    return bits;
  }

  // ---- Sums over streamed rows --------------------------------------------------------------------------------------

  // The weights (or dS) of the streamed row at place `at` of the first 16, for the lane's four resident rows; 16 places
  // on are kFurther bytes. Of every eight neighbours, four have their two groups changed over: eight lanes of one group
  // then write to different banks.
  static constexpr int kFurther = 16 * kWarpRows * 4;
  FASTATTN_DEVICE SharedAddress weights_address(int at) {
    const int chunk = 2 * at + (group() ^ (at >> 2 & 1));
    return shared_base() + static_cast<SharedAddress>(kWeightsAt + warp() * kWarpWeightBytes + chunk * 16);
  }
  // Only the warp itself reads them.
  FASTATTN_DEVICE void store_weights(const float (&x)[4][4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      store_shared_f32x4(weights_address(place()) + static_cast<SharedAddress>(c * kFurther),
                         {{x[0][c], x[1][c], x[2][c], x[3][c]}});
    }
  }

  // The lane's resident rows, columns 4 place to 4 place + 3 of a step: sums of weight times streamed row. `streamed`
  // rows exist.
  template <int kRows>
  FASTATTN_DEVICE void weighted_sums(float (&sums)[kRows][4], int streamed) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[r][e] = 0.0f;
    }
    const int quads = streamed < kStreamed ? (streamed + 3) / 4 : kStreamed / 4;
    const SharedAddress column = shared_base() + static_cast<SharedAddress>(kStreamedAt + place() * 16);
#pragma unroll 1
    for (int quad = 0; quad < quads; ++quad) {
      const SharedAddress weights = weights_address(quad), rows = column + static_cast<SharedAddress>(quad * kRowBytes);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const F32x4 weight = load_shared_f32x4(weights + static_cast<SharedAddress>(c * kFurther));
        const F32x4 y = load_shared_f32x4(rows + static_cast<SharedAddress>(16 * c * kRowBytes));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[r][e] = multiply_add(weight.x[r], y.x[e], sums[r][e]);
        }
      }
    }
  }

  // What flows back into q or k, but for the factor 4 w: sums of dS (1/4 - (u - 1/2)^2). With kWantsDw also, over the
  // lane's resident rows, of dS (u - 1/2).
  //
  // kPaired: two neighbouring columns share a reciprocal, which pays where there is little else to do: without dw. A u
  // of 1 is then off by the roundings of three steps, and u - u^2 would be nothing but those; it is u^2 E_q E_k as
  // well, of which the resident row's factor waits for the end of the sum. No product overflows: E_q E_k is at most
  // e^43, and a factor alone at most e^31.
  template <int kRows, bool kIsFar, bool kWantsDw>
  FASTATTN_DEVICE void gradient_sums(float (&sums)[kRows][4], float (&dw)[4], int streamed) {
    constexpr bool kPaired = !kIsFar && !kWantsDw;
    const SharedAddress column = shared_base() + static_cast<SharedAddress>(place() * 16);
    F32x4 x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = load_shared_f32x4(column + static_cast<SharedAddress>(resident_row(r) * kRowBytes));
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[r][e] = 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) dw[e] = 0.0f;
    const int quads = streamed < kStreamed ? (streamed + 3) / 4 : kStreamed / 4;
#pragma unroll 1
    for (int quad = 0; quad < quads; ++quad) {
      const SharedAddress weights = weights_address(quad);
      const SharedAddress rows = column + static_cast<SharedAddress>(kStreamedAt + quad * kRowBytes);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const F32x4 ds = load_shared_f32x4(weights + static_cast<SharedAddress>(c * kFurther));
        const F32x4 y = load_shared_f32x4(rows + static_cast<SharedAddress>(16 * c * kRowBytes));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float u[4];
          if constexpr (kPaired) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
              const float a = multiply_add(x[r].x[e], y.x[e], 1.0f), b = multiply_add(x[r].x[e + 1], y.x[e + 1], 1.0f);
              const float reciprocal = reciprocal_approx(a * b);
              u[e] = reciprocal * b;
              u[e + 1] = reciprocal * a;
            }
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              u[e] = kIsFar ? additive_u_directly(x[r].x[e], y.x[e])
                            : reciprocal_approx(multiply_add(x[r].x[e], y.x[e], 1.0f));
            }
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if constexpr (kWantsDw) {
              const float centred = u[e] - 0.5f;
              dw[e] = multiply_add(ds.x[r], centred, dw[e]);
              sums[r][e] = multiply_add(ds.x[r], multiply_add(-centred, centred, 0.25f), sums[r][e]);
            } else if constexpr (kPaired) {
              sums[r][e] = multiply_add(ds.x[r], u[e] * u[e] * y.x[e], sums[r][e]);
            } else {
              sums[r][e] = multiply_add(ds.x[r], multiply_add(-u[e], u[e], u[e]), sums[r][e]);
            }
          }
        }
      }
    }
    if constexpr (kPaired) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[r][e] *= x[r].x[e];
      }
    }
  }

  // Sums that a lane keeps for itself, at `base`: columns 4 place to 4 place + 3 of each step, for its resident rows.
  FASTATTN_DEVICE SharedAddress cell(SharedAddress base, int width, int row, int d0) {
    return base + static_cast<SharedAddress>((row * width + d0 + 4 * place()) * 4);
  }
  FASTATTN_DEVICE void clear_cells(SharedAddress base, int width) {
#pragma unroll 1
    for (int d0 = 0; d0 < width; d0 += kColumns) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
        store_shared_f32x4(cell(base, width, resident_row(r), d0), {{0.0f, 0.0f, 0.0f, 0.0f}});
    }
  }
  // cell = cell * keep + sums * factor, `factor` by column.
  FASTATTN_DEVICE void update_cell(SharedAddress at, float keep, const float (&sums)[4], F32x4 factor) {
    F32x4 x = load_shared_f32x4(at);
#pragma unroll
    for (int e = 0; e < 4; ++e) x.x[e] = multiply_add(x.x[e], keep, sums[e] * factor.x[e]);
    store_shared_f32x4(at, x);
  }

  // Writes the sums at `base`, of every lane, to rows first to first + count - 1 (kResident at most) of a tensor: times
  // `factor`, and by column times w, which may be null. A half-warp has a row, so that eight neighbours are written at
  // a time. Trip counts are the whole CTA's: ptxas would otherwise let lanes part before the barrier that comes first.
  FASTATTN_DEVICE void write_sums(SharedAddress base, int width, const void* w, float factor, DType type, void* tensor,
                                  const int64_t (&stride)[3], int b, int h, int first, int count, int64_t columns,
                                  bool is_aligned) {
    char* const out =
        static_cast<char*>(tensor) + (b * stride[0] + h * stride[1] + first * stride[2]) * element_bytes(type);
    const int end = count < kResident ? count : kResident;
#pragma unroll 1
    for (int d0 = 0; d0 < width; d0 += kColumns) {
      const int d = d0 + 4 * place();
      F32x4 slope;
#pragma unroll
      for (int e = 0; e < 4; ++e) slope.x[e] = factor * (w && d + e < columns ? load_as_float(w, type, d + e) : 1.0f);
#pragma unroll 1
      for (int row0 = 0; row0 < kResident; row0 += kThreads / 16) {
        const int row = row0 + thread() / 16;
        F32x4 x = load_shared_f32x4(cell(base, width, row, d0));
#pragma unroll
        for (int e = 0; e < 4; ++e) x.x[e] *= slope.x[e];
        if (row < end) {
          store_columns(out + row * stride[2] * element_bytes(type), type, d, static_cast<int>(columns), x, is_aligned);
        }
      }
    }
  }
};

}  // namespace fastattn::cuda
