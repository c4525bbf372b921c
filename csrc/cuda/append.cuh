// New keys and values into a cache, in place, with the rotary embedding of q and of the keys: core/cache.h says what
// goes where, and the CPU's counterpart does the same. One warp = one row of k, of v or of q; a row of int8 is gone
// through twice, for its largest number and then for its numbers.
#pragma once

#include <math.h>

#include "core/cache.h"
#include "cuda/ptx.cuh"
#include "cuda/score.cuh"

namespace fastattn::cuda {

struct AppendKernel {
  using Params = CacheAppendParams;
  static constexpr const char* kName = "append_to_cache";
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / 32;

  // A length for each sequence, then the rows of k, of v and of q.
  static int64_t rows(const Params& p) {
    const int64_t of_q = p.rotated_q != nullptr ? p.B * p.Hq * p.Lq : 0;
    return p.B + 2 * p.B * p.Hkv * p.Lnew + of_q;
  }
  static int64_t blocks(const Params& p) { return (rows(p) + kRowsPerBlock - 1) / kRowsPerBlock; }

  FASTATTN_DEVICE int lane() { return thread_index() & 31; }

  // A row of one of the inputs, rotated where cos is not null.
  struct Row {
    const void* data;
    DType type;
    int dim;
    int64_t cos_at, sin_at;
    bool is_rotated;
  };

  FASTATTN_DEVICE void run(const Params& p) {
    int64_t n = block_index() * kRowsPerBlock + (thread_index() >> 5);
    if (n < p.B) {
      if (lane() == 0) p.new_lengths[n] = static_cast<int32_t>(tokens_before(p, n) + p.Lnew);
      return;
    }
    n -= p.B;
    const int64_t new_rows = p.B * p.Hkv * p.Lnew;
    if (n < 2 * new_rows) {
      const bool is_k = n < new_rows;
      if (!is_k) n -= new_rows;
      append(p, is_k, n / p.Lnew / p.Hkv, n / p.Lnew % p.Hkv, n % p.Lnew);
      return;
    }
    n -= 2 * new_rows;
    if (p.rotated_q == nullptr || n >= p.B * p.Hq * p.Lq) return;
    const int64_t i = n % p.Lq, h = n / p.Lq % p.Hq, b = n / p.Lq / p.Hq;
    const Row row = rotated_row(p, element(p, p.q, p.q_stride, b, h, i), p.D, tokens_before(p, b) + p.Lnew - p.Lq + i);
    store(p.dtype, const_cast<void*>(element(p, p.rotated_q, p.rotated_q_stride, b, h, i)), p, row);
  }

  FASTATTN_DEVICE void append(const Params& p, bool is_k, int64_t b, int64_t h, int64_t t) {
    const int64_t token = tokens_before(p, b) + t;
    // Where the host has not refused it, there is no place.
    if (token >= p.max_keys || (p.block_table != nullptr && p.pages == 0)) return;
    const CacheRow to = cache_row(p, b, token);
    const Row row = is_k ? rotated_row(p, element(p, p.k, p.k_stride, b, h, t), p.D, token)
                         : Row{element(p, p.v, p.v_stride, b, h, t), p.dtype, static_cast<int>(p.Dv), 0, 0, false};
    void* const cache = is_k ? p.k_cache : p.v_cache;
    const int64_t(&stride)[3] = is_k ? p.k_cache_stride : p.v_cache_stride;
    if (p.k_scale == nullptr) {
      store(p.dtype, const_cast<void*>(element(p, cache, stride, to.batch, h, to.row)), p, row);
      return;
    }
    const int64_t(&scale_stride)[3] = is_k ? p.k_scale_stride : p.v_scale_stride;
    float* const scale =
        (is_k ? p.k_scale : p.v_scale) + (to.batch * scale_stride[0] + h * scale_stride[1] + to.row * scale_stride[2]);
    quantise(static_cast<int8_t*>(cache) + (to.batch * stride[0] + h * stride[1] + to.row * stride[2]), scale, p, row);
  }

  FASTATTN_DEVICE const void* element(const Params& p, const void* data, const int64_t (&stride)[3], int64_t b,
                                      int64_t h, int64_t row) {
    const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    return static_cast<const char*>(data) + (b * stride[0] + h * stride[1] + row * stride[2]) * bytes;
  }

  FASTATTN_DEVICE Row rotated_row(const Params& p, const void* data, int64_t dim, int64_t position) {
    Row row = {data, p.dtype, static_cast<int>(dim), 0, 0, p.cos != nullptr && p.positions > 0};
    if (row.is_rotated) {
      const int64_t angle = rotary_row(p, position);
      row.cos_at = angle * p.cos_stride;
      row.sin_at = angle * p.sin_stride;
    }
    return row;
  }

  FASTATTN_DEVICE float number(const Params& p, const Row& row, int c) {
    const float x = load_as_float(row.data, row.type, c);
    const int R = static_cast<int>(p.rotary_dim);
    if (!row.is_rotated || c >= R) return x;
    // The partner's number, and which of the two this one is.
    const bool is_first = p.rotary_interleaved ? c % 2 == 0 : c < R / 2;
    const int step = p.rotary_interleaved ? 1 : R / 2, angle = p.rotary_interleaved ? c / 2 : is_first ? c : c - step;
    const float y = load_as_float(row.data, row.type, is_first ? c + step : c - step);
    const float cosine = load_as_float(p.cos, p.rotary_dtype, row.cos_at + angle);
    const float sine = load_as_float(p.sin, p.rotary_dtype, row.sin_at + angle);
    return is_first ? x * cosine - y * sine : x * cosine + y * sine;
  }

  FASTATTN_DEVICE void store(DType type, void* out, const Params& p, const Row& row) {
    for (int c = lane(); c < row.dim; c += 32) {
      const float x = number(p, row, c);
      if (type == DType::kFloat32) {
        static_cast<float*>(out)[c] = x;
      } else {
        const uint32_t bits = type == DType::kBFloat16 ? pack_bf16(x, 0.0f) : pack_f16(x, 0.0f);
        static_cast<uint16_t*>(out)[c] = static_cast<uint16_t>(bits);
      }
    }
  }

  FASTATTN_DEVICE void quantise(int8_t* out, float* scale_out, const Params& p, const Row& row) {
    float largest = 0.0f;
    bool is_finite = true;
    for (int c = lane(); c < row.dim; c += 32) {
      const float x = fabsf(number(p, row, c));
      is_finite = is_finite && x < kInfinity;  // false for a NaN
      largest = fmaxf(largest, x);
    }
    // What is not finite counts as an infinity, which no maximum loses.
    if (!is_finite) largest = kInfinity;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) largest = fmaxf(largest, shuffle_xor(largest, distance));
    float scale = largest / 127.0f;
    if (!(largest < kInfinity)) scale = bits_float(0x7fc00000u);
    const bool has_numbers = scale > 0.0f;
    for (int c = lane(); c < row.dim; c += 32) {
      const float x = has_numbers ? fminf(fmaxf(rintf(number(p, row, c) / scale), -127.0f), 127.0f) : 0.0f;
      out[c] = static_cast<int8_t>(x);
    }
    if (lane() == 0) *scale_out = scale;
  }
};

}  // namespace fastattn::cuda
