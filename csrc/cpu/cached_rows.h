// The keys or values of a tile as rows that the operands (operands.h) can take: where they lie, or copied out of the
// pages of a cache, or out of its int8 numbers.
#pragma once

#include <string.h>

#include "core/sequence.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

template <class Raw>
struct CachedRows {
  const Raw* data;
  int64_t stride;
};

// k or v.
struct CacheView {
  const void* data;
  const int64_t (&stride)[3];
  const float* scale;  // null: not int8
  const int64_t (&scale_stride)[3];
  int64_t columns;
};
FASTATTN_FN CacheView cached_keys(const AttentionParams& p) {
  return {p.k, p.k_stride, p.k_scale, p.k_scale_stride, p.D};
}
FASTATTN_FN CacheView cached_values(const AttentionParams& p) {
  return {p.v, p.v_stride, p.v_scale, p.v_scale_stride, p.Dv};
}

// Numbers of scratch for `rows` copied rows.
FASTATTN_FN int64_t cached_copy(const AttentionParams& p, int64_t rows, int64_t columns) {
  return p.block_table != nullptr || p.k_scale != nullptr ? rows * columns : 0;
}

template <class Element>
inline void dequantise_row(typename Element::Raw* to, const int8_t* from, float scale, int64_t columns) {
  const Vf factor = vset(scale);
  for (int64_t c = 0; c < columns; c += kLanes) {
    float numbers[kLanes] = {};
    if (columns - c >= kLanes) {
      for (int l = 0; l < kLanes; ++l) numbers[l] = static_cast<float>(from[c + l]);
    } else {
      for (int64_t l = 0; l < columns - c; ++l) numbers[l] = static_cast<float>(from[c + l]);
    }
    Element::store_first(to + c, vmul(vload(numbers), factor), columns - c);
  }
}

template <class Element>
inline CachedRows<typename Element::Raw> copied_rows(const AttentionParams& p, const CacheView& view, int64_t b,
                                                     int64_t hkv, int64_t j0, int64_t nk, typename Element::Raw* copy) {
  using Raw = typename Element::Raw;
  for (int64_t j = j0; j < j0 + nk;) {
    const KeyRun run = key_run(p, b, j, j0 + nk);
    if (view.scale == nullptr) {
      const Raw* from = row_at<const Raw>(view.data, view.stride, run.batch, hkv, run.row);
      if (run.count == nk) return {from, view.stride[2]};
      for (int64_t r = 0; r < run.count; ++r) {
        memcpy(copy + (j - j0 + r) * view.columns, from + r * view.stride[2],
               sizeof(Raw) * static_cast<size_t>(view.columns));
      }
    } else {
      const int8_t* from = row_at<const int8_t>(view.data, view.stride, run.batch, hkv, run.row);
      const float* scale = row_at<const float>(view.scale, view.scale_stride, run.batch, hkv, run.row);
      for (int64_t r = 0; r < run.count; ++r) {
        dequantise_row<Element>(copy + (j - j0 + r) * view.columns, from + r * view.stride[2],
                                scale[r * view.scale_stride[2]], view.columns);
      }
    }
    j += run.count;
  }
  return {copy, view.columns};
}

// Rows [j0, j0 + nk) of head hkv of sequence b.
template <class Element>
FASTATTN_FN CachedRows<typename Element::Raw> cached_rows(const AttentionParams& p, const CacheView& view, int64_t b,
                                                          int64_t hkv, int64_t j0, int64_t nk,
                                                          typename Element::Raw* copy) {
  using Raw = typename Element::Raw;
  if (p.block_table != nullptr || view.scale != nullptr) {
    return copied_rows<Element>(p, view, b, hkv, j0, nk, copy);
  }
  return {row_at<const Raw>(view.data, view.stride, b, hkv, j0), view.stride[2]};
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
