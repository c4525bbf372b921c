// How the kernels read a head's rows as matrix operands, for each element type and unit of arithmetic.
//
//   FloatOperands<Element>   float arithmetic; 16-bit elements are widened block by block
//   Bf16Operands             bfloat16 dot products straight on the caller's rows
//
// "Broadcast" operands are read number by number (row-major or column-major A of gemm.h), "vector" operands by rows of
// vectors (B). Rows are used in place wherever the micro-kernels may read them, and else copied with zero padding.
#pragma once

#include "core/mask.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// Row-major kernels read at least this many rows of A.
constexpr int64_t kRowPad = 12;

// The factor of the products q . k; additive scores have none.
FASTATTN_FN float product_scale(const AttentionParams& p) {
  return p.w != nullptr ? 1.0f : static_cast<float>(p.scale);
}

// An operand: rows (or pairs of rows) of 32-bit units.
struct Operand {
  const char* data;
  int64_t stride_bytes;
};

template <class ElementType>
struct FloatOperands {
  using Element = ElementType;
  using Raw = typename Element::Raw;
  using Unit = Float32Unit;
  static constexpr bool kPairs = false;
  static constexpr bool kInPlace = sizeof(Raw) == sizeof(float);
  static constexpr int kExp2Degree = 5;

  FASTATTN_FN int64_t units(int64_t columns) { return columns; }  // along a contraction
  FASTATTN_FN int64_t padded(int64_t columns) { return round_up(columns, kLanes > 8 ? kLanes : 8); }
  // Floats of scratch for a copy of `rows` rows.
  FASTATTN_FN int64_t copy_floats(int64_t rows, int64_t columns) { return round_up(rows, kRowPad) * padded(columns); }

  // Q^T or dO^T of a block of rows, by panels; `columns` of a contraction become transposed_columns units.
  FASTATTN_FN int64_t transposed_columns(int64_t columns) { return round_up(columns, kLanes); }
  FASTATTN_FN void transposed(float* to, const Raw* from, int64_t stride, int64_t rows, int64_t columns, float factor) {
    transpose_rows<Element>(to, from, stride, rows, columns, factor);
  }
  FASTATTN_FN bool rows_are_in_place(int64_t) { return kInPlace; }
  FASTATTN_FN bool columns_are_in_place(int64_t columns) { return kInPlace && columns % kColumnRows == 0; }
  FASTATTN_FN Operand copied_rows(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    const int64_t width = padded(columns);
    widen_rows<Element>(copy, width, from, stride, rows, columns, max_i64(rows, kRowPad), width);
    return {reinterpret_cast<const char*>(copy), width * 4};
  }
  FASTATTN_FN Operand copied_columns(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    return copied_rows(copy, from, stride, rows, columns);
  }
  // K or V as row-major A.
  FASTATTN_FN Operand broadcast_rows(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    if constexpr (kInPlace) {
      if (rows >= kRowPad) return {reinterpret_cast<const char*>(from), stride * 4};
    }
    return copied_rows(copy, from, stride, rows, columns);
  }
  // V as column-major A: contraction over its rows.
  FASTATTN_FN Operand broadcast_columns(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    if constexpr (kInPlace) {
      if (columns_are_in_place(columns)) return {reinterpret_cast<const char*>(from), stride * 4};
    }
    return copied_columns(copy, from, stride, rows, columns);
  }
  // Q, dO or K as B: contraction over its rows.
  FASTATTN_FN Operand vector_rows(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    if constexpr (kInPlace) {
      if (columns % kLanes == 0) return {reinterpret_cast<const char*>(from), stride * 4};
    }
    return copied_rows(copy, from, stride, rows, columns);
  }
};

#if FASTATTN_BF16_DOT
struct Bf16Operands {
  using Element = BFloat16;
  using Raw = uint16_t;
  using Unit = Bf16Pair;
  static constexpr bool kPairs = true;
  static constexpr int kExp2Degree = 3;

  FASTATTN_FN int64_t units(int64_t columns) { return (columns + 1) / 2; }
  FASTATTN_FN int64_t padded(int64_t columns) { return round_up(columns, 2 * kLanes); }
  // Interleaved rows need half the rows at twice the width; plain copies need half a float a number.
  FASTATTN_FN int64_t copy_floats(int64_t rows, int64_t columns) {
    return round_up(rows, kRowPad) / 2 * padded(columns);
  }

  FASTATTN_FN int64_t transposed_columns(int64_t columns) { return round_up(units(columns), kLanes); }
  FASTATTN_FN void transposed(float* to, const Raw* from, int64_t stride, int64_t rows, int64_t columns, float) {
    transpose_pairs(reinterpret_cast<uint32_t*>(to), from, stride, rows, columns);
  }
  // An odd last column would be paired with its neighbour in memory, which may be NaN.
  FASTATTN_FN bool rows_are_in_place(int64_t columns) { return columns % 2 == 0; }
  FASTATTN_FN bool columns_are_in_place(int64_t) { return false; }
  FASTATTN_FN Operand copied_rows(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    uint16_t* to = reinterpret_cast<uint16_t*>(copy);
    const int64_t width = padded(columns);
    copy_pairs(to, width, from, stride, rows, columns, max_i64(rows, kRowPad), width);
    return {reinterpret_cast<const char*>(to), width * 2};
  }
  FASTATTN_FN Operand copied_columns(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    uint32_t* to = reinterpret_cast<uint32_t*>(copy);
    interleave_rows(to, padded(columns), from, stride, rows, columns);
    return {reinterpret_cast<const char*>(to), padded(columns) * 4};
  }
  FASTATTN_FN Operand broadcast_rows(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    if (rows >= kRowPad && rows_are_in_place(columns)) return {reinterpret_cast<const char*>(from), stride * 2};
    return copied_rows(copy, from, stride, rows, columns);
  }
  FASTATTN_FN Operand broadcast_columns(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    return copied_columns(copy, from, stride, rows, columns);
  }
  FASTATTN_FN Operand vector_rows(float* copy, const Raw* from, int64_t stride, int64_t rows, int64_t columns) {
    return copied_columns(copy, from, stride, rows, columns);
  }
};
#endif

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
