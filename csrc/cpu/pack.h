// Moving rows between the caller's tensors and the layouts of the micro-kernels: widening, padding, transposing.
#pragma once

#include <string.h>

#include "core/macros.h"
#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// How the elements of a tensor are read into, and written from, float lanes.
struct Float32 {
  using Raw = float;
  static constexpr int kBits = 24;  // of the significand
  FASTATTN_FN Vf load(const Raw* p) { return vload(p); }
  FASTATTN_FN void store(Raw* p, Vf x) { vstore(p, x); }
  FASTATTN_FN Vf load_first(const Raw* p, int64_t n) { return n >= kLanes ? load(p) : vload_first(p, n); }
  FASTATTN_FN void store_first(Raw* p, Vf x, int64_t n) {
    if (n >= kLanes) {
      vstore(p, x);
    } else {
      vstore_first(p, x, n);
    }
  }
};
struct BFloat16 {
  using Raw = uint16_t;
  static constexpr int kBits = 8;
  FASTATTN_FN Vf load(const Raw* p) { return vload_bf16(p); }
  FASTATTN_FN void store(Raw* p, Vf x) { vstore_bf16(p, x); }
  FASTATTN_FN Vf load_first(const Raw* p, int64_t n) { return n >= kLanes ? load(p) : vload_bf16_first(p, n); }
  FASTATTN_FN void store_first(Raw* p, Vf x, int64_t n) { vstore_bf16_first(p, x, n); }
};
struct Float16 {
  using Raw = uint16_t;
  static constexpr int kBits = 11;
  FASTATTN_FN Vf load(const Raw* p) { return vload_f16(p); }
  FASTATTN_FN void store(Raw* p, Vf x) { vstore_f16(p, x); }
  FASTATTN_FN Vf load_first(const Raw* p, int64_t n) { return n >= kLanes ? load(p) : vload_f16_first(p, n); }
  FASTATTN_FN void store_first(Raw* p, Vf x, int64_t n) { vstore_f16_first(p, x, n); }
};

// Numbers of a quantised cache, which is only read.
struct Int8 {
  using Raw = int8_t;
  FASTATTN_FN Vf load(const Raw* p) { return vload_i8(p); }
  FASTATTN_FN Vf load_first(const Raw* p, int64_t n) { return n >= kLanes ? load(p) : vload_i8_first(p, n); }
};

FASTATTN_FN constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Address of a row of a [batch, head, row, :] tensor with a contiguous last dimension.
template <class Raw>
FASTATTN_FN Raw* row_at(const void* base, const int64_t (&stride)[3], int64_t b, int64_t h, int64_t row) {
  return const_cast<Raw*>(static_cast<const Raw*>(base)) + b * stride[0] + h * stride[1] + row * stride[2];
}

// Walks over scratch memory; every piece starts on a cache line.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// Blocks of rows are transposed panel by panel: [panel][column][kPanelRows], each panel contiguous, since columns a
// whole block apart would fall into the same few sets of the first-level cache.
constexpr int64_t kPanelRows = kPanelVectors * kLanes;

// Offset of row r of a transposed block that has `columns` columns; its columns lie kPanelRows apart.
FASTATTN_FN int64_t panel_offset(int64_t r, int64_t columns) {
  return r / kPanelRows * kPanelRows * columns + r % kPanelRows;
}

// Widens rows into floats, with zeros up to `padded_columns` (a multiple of kLanes) and `padded_rows`.
template <class Element>
inline void widen_rows(float* to, int64_t to_stride, const typename Element::Raw* from, int64_t from_stride,
                       int64_t rows, int64_t columns, int64_t padded_rows, int64_t padded_columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < padded_columns; c += kLanes) {
      const Vf x = c < columns ? Element::load_first(from + r * from_stride + c, columns - c) : vzero();
      vstore(to + r * to_stride + c, x);
    }
  }
  for (int64_t r = rows; r < padded_rows; ++r) memset(to + r * to_stride, 0, sizeof(float) * padded_columns);
}

// kLanes rows of kLanes numbers, zero beyond `rows` and `columns`.
template <class Element>
FASTATTN_FN void load_tile(Vf (&tile)[kLanes], const typename Element::Raw* from, int64_t stride, int64_t rows,
                           int64_t columns) {
  if (rows >= kLanes && columns >= kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) tile[r] = Element::load(from + r * stride);
  } else {
    for (int r = 0; r < kLanes; ++r) tile[r] = r < rows ? Element::load_first(from + r * stride, columns) : vzero();
  }
}

// The reverse.
template <class Element>
FASTATTN_FN void store_tile(const Vf (&tile)[kLanes], typename Element::Raw* to, int64_t stride, int64_t rows,
                            int64_t columns) {
  if (rows >= kLanes && columns >= kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) Element::store(to + r * stride, tile[r]);
  } else {
    for (int r = 0; r < kLanes && r < rows; ++r) Element::store_first(to + r * stride, tile[r], columns);
  }
}

// The transposed copy of a block of rows, times factor, that the row-major kernels read as B. It has
// round_up(columns, kLanes) columns; missing rows of the last vector are zero.
template <class Element>
inline void transpose_rows(float* to, const typename Element::Raw* from, int64_t from_stride, int64_t rows,
                           int64_t columns, float factor) {
  const Vf f = vset(factor);
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    float* panel = to + panel_offset(r0, round_up(columns, kLanes));
    for (int64_t c0 = 0; c0 < columns; c0 += kLanes) {
      Vf tile[kLanes];
      load_tile<Element>(tile, from + r0 * from_stride + c0, from_stride, rows - r0, columns - c0);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) tile[r] = vmul(f, tile[r]);
      vtranspose(tile);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) vstore(panel + (c0 + c) * kPanelRows, tile[c]);
    }
  }
}

// The reverse, each row r times row_factor[r]; `from` has padded_columns columns.
template <class Element>
inline void transpose_back(typename Element::Raw* to, int64_t to_stride, const float* from, int64_t padded_columns,
                           int64_t rows, int64_t columns, const float* row_factor) {
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    const float* panel = from + panel_offset(r0, padded_columns);
    const Vf f = vload(row_factor + r0);
    for (int64_t c0 = 0; c0 < columns; c0 += kLanes) {
      Vf tile[kLanes];
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) tile[c] = vmul(f, vload(panel + (c0 + c) * kPanelRows));
      vtranspose(tile);
      store_tile<Element>(tile, to + r0 * to_stride + c0, to_stride, rows - r0, columns - c0);
    }
  }
}

template <class Element>
inline float dot(const typename Element::Raw* a, const typename Element::Raw* b, int64_t n) {
  Vf sum = vzero();
  for (int64_t c = 0; c < n; c += kLanes) {
    sum = vfma(Element::load_first(a + c, n - c), Element::load_first(b + c, n - c), sum);
  }
  return vreduce_add(sum);
}

// Rounds rows of floats into a tensor.
template <class Element>
inline void narrow_rows(typename Element::Raw* to, int64_t to_stride, const float* from, int64_t from_stride,
                        int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Element::store_first(to + r * to_stride + c, vload(from + r * from_stride + c), columns - c);
    }
  }
}

template <class Element>
inline void zero_rows(typename Element::Raw* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) memset(to + r * to_stride, 0, sizeof(typename Element::Raw) * columns);
}

#if FASTATTN_BF16_DOT
// transpose_rows for pairs along the columns; it has round_up(pairs, kLanes) columns of pairs.
inline void transpose_pairs(uint32_t* to, const uint16_t* from, int64_t from_stride, int64_t rows, int64_t columns) {
  const int64_t units = (columns + 1) / 2;
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    uint32_t* panel = to + panel_offset(r0, round_up(units, kLanes));
    for (int64_t u0 = 0; u0 < units; u0 += kLanes) {
      Vf tile[kLanes];
      if (rows - r0 >= kLanes && units - u0 >= kLanes && columns % 2 == 0) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          const uint16_t* row = from + (r0 + r) * from_stride + 2 * u0;
          tile[r] = vbits_as_float(viload(reinterpret_cast<const uint32_t*>(row)));
        }
      } else {
        for (int r = 0; r < kLanes; ++r) {
          const uint16_t* row = from + (r0 + r) * from_stride + 2 * u0;
          tile[r] = r0 + r < rows ? vbits_as_float(vload_pairs_first(row, columns - 2 * u0)) : vzero();
        }
      }
      vtranspose(tile);
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u) vistore(panel + (u0 + u) * kPanelRows, vbits_as_int(tile[u]));
    }
  }
}

// Copies rows of bfloat16 numbers with zeros up to `padded_columns` (a multiple of 2 * kLanes) and `padded_rows`.
inline void copy_pairs(uint16_t* to, int64_t to_stride, const uint16_t* from, int64_t from_stride, int64_t rows,
                       int64_t columns, int64_t padded_rows, int64_t padded_columns) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t c = 0; c < padded_columns; c += 2 * kLanes) {
      const Vi x = r < rows && c < columns ? vload_pairs_first(from + r * from_stride + c, columns - c) : viset(0);
      vistore(reinterpret_cast<uint32_t*>(to + r * to_stride + c), x);
    }
  }
}

// to[r / 2][c] = (from[r][c], from[r + 1][c]), with zeros for a missing last row and up to the next multiple of
// 2 * kLanes columns.
inline void interleave_rows(uint32_t* to, int64_t to_stride, const uint16_t* from, int64_t from_stride, int64_t rows,
                            int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* low = from + r * from_stride;
    const bool has_high = r + 1 < rows;
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
      Vi first, second;
      vinterleave_rows(vload_pairs_first(low + c, columns - c),
                       has_high ? vload_pairs_first(low + from_stride + c, columns - c) : viset(0), &first, &second);
      vistore(to + r / 2 * to_stride + c, first);
      vistore(to + r / 2 * to_stride + c + kLanes, second);
    }
  }
}
#endif

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
