// New keys and values into a cache: rotated, rounded, quantised. core/cache.h has the formulas.
//
// An item is a few tokens of one sequence with all their heads, so that what belongs to a position, its row of cos and
// sin, is read once for all of them. Everything passes through one row of floats in scratch memory but what is only
// copied.
#pragma once

#include <string.h>

#include "core/cache.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// One worker's memory. Vectors may spill over a row's end.
struct AppendScratch {
  float *row, *rotated;  // [max(D, Dv)]
  float *cos, *sin;      // [rotary_dim / 2]
};

inline AppendScratch append_scratch(const CacheAppendParams& p, char* memory, size_t* bytes) {
  Arena arena{memory};
  const int64_t width = round_up(max_i64(p.D, p.Dv), kLanes) + kLanes;
  const int64_t angles = p.rotary_dim == 0 ? 0 : round_up(p.rotary_dim / 2, kLanes) + kLanes;
  AppendScratch s;
  s.row = arena.take<float>(width);
  s.rotated = arena.take<float>(width);
  s.cos = arena.take<float>(angles);
  s.sin = arena.take<float>(angles);
  if (bytes != nullptr) *bytes = static_cast<size_t>(arena.at - memory);
  return s;
}

template <class Element>
inline void widen_row(float* to, const void* from, int64_t at, int64_t columns) {
  const auto* row = static_cast<const typename Element::Raw*>(from) + at;
  for (int64_t c = 0; c < columns; c += kLanes) vstore(to + c, Element::load_first(row + c, columns - c));
}

template <class Element>
inline void load_angles(const CacheAppendParams& p, int64_t position, const AppendScratch& s) {
  const int64_t at = rotary_row(p, position), half = p.rotary_dim / 2;
  if (p.rotary_dtype == DType::kFloat32) {
    widen_row<Float32>(s.cos, p.cos, at * p.cos_stride, half);
    widen_row<Float32>(s.sin, p.sin, at * p.sin_stride, half);
  } else {
    widen_row<Element>(s.cos, p.cos, at * p.cos_stride, half);
    widen_row<Element>(s.sin, p.sin, at * p.sin_stride, half);
  }
}

// s.rotated = s.row, rotated.
inline void rotate(const CacheAppendParams& p, const AppendScratch& s) {
  const int64_t half = p.rotary_dim / 2;
  const float *x = s.row, *cos = s.cos, *sin = s.sin;
  float* to = s.rotated;
  if (p.rotary_interleaved) {
    for (int64_t c = 0; c < half; ++c) {
      const float a = x[2 * c], b = x[2 * c + 1];
      to[2 * c] = a * cos[c] - b * sin[c];
      to[2 * c + 1] = b * cos[c] + a * sin[c];
    }
  } else {
    // What the last vector of a part spills over its end, the next part overwrites.
    for (int64_t c = 0; c < half; c += kLanes) {
      const Vf a = vload(x + c), b = vload(x + half + c);
      vstore(to + c, vnegative_fma(b, vload(sin + c), vmul(a, vload(cos + c))));
    }
    for (int64_t c = 0; c < half; c += kLanes) {
      const Vf a = vload(x + c), b = vload(x + half + c);
      vstore(to + half + c, vfma(a, vload(sin + c), vmul(b, vload(cos + c))));
    }
  }
  for (int64_t c = p.rotary_dim; c < p.D; c += kLanes) vstore(to + c, vload(x + c));
}

// Rounds a row to int8 and returns its scale. Lanes beyond its end are zeroed.
inline float quantise_row(int8_t* to, float* row, int64_t columns) {
  for (int64_t c = columns; c < round_up(columns, kLanes); ++c) row[c] = 0.0f;
  Vf largest = vzero(), not_finite = vzero();
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Vf x = vload(row + c);
    largest = vmax(vabs(x), largest);
    not_finite = vfma(x, vzero(), not_finite);  // 0, or NaN where x is infinite or NaN
  }
  const bool is_finite = vreduce_add(not_finite) == 0.0f;
  const float scale = vreduce_max(largest) / 127.0f;
  if (!is_finite || scale == 0.0f) {
    for (int64_t c = 0; c < columns; ++c) to[c] = 0;
    return is_finite ? 0.0f : __builtin_nanf("");
  }
  // 1.5 * 2^23: the sum's last bits are the nearest whole number, in two's complement. A scale that was rounded itself,
  // as those of denormal numbers are, may lead beyond 127.
  const Vf whole = vset(12582912.0f), limit = vset(127.0f), lower = vset(-127.0f);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Vf x = vmin(vmax(vdiv(vload(row + c), vset(scale)), lower), limit);
    uint32_t numbers[kLanes];
    vistore(numbers, vbits_as_int(vadd(x, whole)));
    if (columns - c >= kLanes) {
      for (int l = 0; l < kLanes; ++l) to[c + l] = static_cast<int8_t>(numbers[l]);
    } else {
      for (int64_t l = 0; l < columns - c; ++l) to[c + l] = static_cast<int8_t>(numbers[l]);
    }
  }
  return scale;
}

// One row of k or v into the cache; row_at of these strides is where it goes.
template <class Element>
inline void append_row(const typename Element::Raw* from, int64_t columns, bool is_rotated, const CacheAppendParams& p,
                       void* cache, int64_t at, float* scale, const AppendScratch& s) {
  using Raw = typename Element::Raw;
  if (!is_rotated && scale == nullptr) {
    memcpy(static_cast<Raw*>(cache) + at, from, sizeof(Raw) * static_cast<size_t>(columns));
    return;
  }
  widen_row<Element>(s.row, from, 0, columns);
  if (is_rotated) rotate(p, s);
  float* row = is_rotated ? s.rotated : s.row;
  if (scale != nullptr) {
    *scale = quantise_row(static_cast<int8_t*>(cache) + at, row, columns);
  } else {
    narrow_rows<Element>(static_cast<Raw*>(cache) + at, 0, row, 0, 1, columns);
  }
}

FASTATTN_FN int64_t offset_of(const int64_t (&stride)[3], int64_t batch, int64_t h, int64_t row) {
  return batch * stride[0] + h * stride[1] + row * stride[2];
}

template <class Element>
inline void append_item_as(const CacheAppendParams& p, const AppendItem& item, char* memory) {
  using Raw = typename Element::Raw;
  const AppendScratch s = append_scratch(p, memory, nullptr);
  const int64_t before = tokens_before(p, item.b);
  for (int64_t t = item.t0; t < item.t1; ++t) {
    if (p.rotary_dim != 0) load_angles<Element>(p, before + t, s);
    const CacheRow to = cache_row(p, item.b, before + t);
    for (int64_t h = 0; h < p.Hkv; ++h) {
      const auto scale_at = [&](float* scale, const int64_t(&stride)[3]) {
        return scale == nullptr ? nullptr : scale + offset_of(stride, to.batch, h, to.row);
      };
      append_row<Element>(row_at<const Raw>(p.k, p.k_stride, item.b, h, t), p.D, p.rotary_dim != 0, p, p.k_cache,
                          offset_of(p.k_cache_stride, to.batch, h, to.row), scale_at(p.k_scale, p.k_scale_stride), s);
      append_row<Element>(row_at<const Raw>(p.v, p.v_stride, item.b, h, t), p.Dv, false, p, p.v_cache,
                          offset_of(p.v_cache_stride, to.batch, h, to.row), scale_at(p.v_scale, p.v_scale_stride), s);
    }
    const int64_t i = t - (p.Lnew - p.Lq);
    if (p.rotary_dim == 0 || i < 0) continue;
    for (int64_t h = 0; h < p.Hq; ++h) {
      widen_row<Element>(s.row, p.q, offset_of(p.q_stride, item.b, h, i), p.D);
      rotate(p, s);
      narrow_rows<Element>(row_at<Raw>(p.rotated_q, p.rotated_q_stride, item.b, h, i), 0, s.rotated, 0, 1, p.D);
    }
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
