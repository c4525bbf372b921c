// What is asked of a backend before it attends over a cache: new keys and values go into it in place, their lengths
// are counted up, and where there is a rotary embedding, q and the new keys are rotated on the way:
//
//   first       = cache_lengths[b]                     (of the tokens in the cache, before any is appended)
//   k_cache[b, h, first + t, :] = rotated(k[b, h, t, :], first + t)        v_cache[b, h, first + t, :] = v[b, h, t, :]
//   rotated_q[b, h, i, :]       = rotated(q[b, h, i, :], first + Lnew - Lq + i)         new_lengths[b] = first + Lnew
//
//   rotated(x, n)[c]        = x[c] cos[n, c] - x[c + R/2] sin[n, c]        R = rotary_dim, c < R/2
//   rotated(x, n)[c + R/2]  = x[c + R/2] cos[n, c] + x[c] sin[n, c]        what lies beyond R stays as it is
//
// With rotary_interleaved the two partners are numbers 2c and 2c + 1 instead of c and c + R/2. Float arithmetic (double
// for kFloat64), rounded once, to dtype or to int8.
//
// int8 rows: scale = max |x| / 127 and number = x / scale, rounded to the nearest, halves to the even one. A row of
// zeros has scale 0. A row that holds an infinity or a NaN has scale NaN, and so is NaN as a whole.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/mask.h"
#include "core/params.h"

namespace fastattn {

struct CacheAppendParams {
  DType dtype = DType::kFloat32;
  int64_t B = 0, Hq = 0, Hkv = 0, Lq = 0, Lnew = 0, D = 0, Dv = 0;

  const void* k = nullptr;  // [B, Hkv, Lnew, D], of dtype; null with Lnew = 0
  const void* v = nullptr;  // [B, Hkv, Lnew, Dv]
  int64_t k_stride[3] = {}, v_stride[3] = {};

  // As in AttentionParams, to be written: of dtype, or int8 where there are scales. Strides: batch or page, head, row.
  void* k_cache = nullptr;  // [B or pages, Hkv, rows, D]
  void* v_cache = nullptr;  // [B or pages, Hkv, rows, Dv]
  int64_t k_cache_stride[3] = {}, v_cache_stride[3] = {};
  float* k_scale = nullptr;  // [B or pages, Hkv, rows]; both or none
  float* v_scale = nullptr;
  int64_t k_scale_stride[3] = {}, v_scale_stride[3] = {};

  const int32_t* cache_lengths = nullptr;  // [B], contiguous
  int32_t* new_lengths = nullptr;          // [B], contiguous, to be written; may not be cache_lengths
  int64_t max_keys = 0;                    // rows of the cache, or of a sequence's pages together

  const int32_t* block_table = nullptr;  // [B][block_table_stride], or null
  int64_t block_table_stride = 0, page_size = 0, pages = 0;

  // Rotary embedding; null: none.
  const void* cos = nullptr;  // [positions, rotary_dim / 2], of rotary_dtype: dtype or kFloat32; rows contiguous
  const void* sin = nullptr;
  DType rotary_dtype = DType::kFloat32;
  int64_t cos_stride = 0, sin_stride = 0;
  int64_t rotary_dim = 0;  // even, at most D
  int64_t positions = 0;   // at least max(new_lengths)
  bool rotary_interleaved = false;
  const void* q = nullptr;    // [B, Hq, Lq, D], Lq <= Lnew
  void* rotated_q = nullptr;  // [B, Hq, Lq, D]
  int64_t q_stride[3] = {}, rotated_q_stride[3] = {};
};

// The tokens of sequence b before the append. On a GPU nobody can check them without waiting for the device: there, a
// number that leads out of the cache counts as the nearest that does not.
FASTATTN_FN int64_t tokens_before(const CacheAppendParams& p, int64_t b) {
  return clamp_i64(p.cache_lengths[b], 0, p.max_keys - p.Lnew);
}

// Where a token of sequence b goes: row `row` of batch entry (or page) `batch`. Beyond the pages: the nearest one.
struct CacheRow {
  int64_t batch, row;
};
FASTATTN_FN CacheRow cache_row(const CacheAppendParams& p, int64_t b, int64_t token) {
  if (p.block_table == nullptr) return {b, token};
  const int64_t page = token / p.page_size;
  return {clamp_i64(p.block_table[b * p.block_table_stride + page], 0, p.pages - 1), token - page * p.page_size};
}

// The row of cos and sin for a position.
FASTATTN_FN int64_t rotary_row(const CacheAppendParams& p, int64_t position) {
  return clamp_i64(position, 0, p.positions - 1);
}

}  // namespace fastattn
