// The matrix micro-kernels: R rows by NV vectors of accumulators in registers.
//
//   C[r][lanes] = (C, by Output) + sum_k A(r, k) * B[k][lanes]
//
// A is read by scalar broadcast, straight from the caller's memory; B and C are rows of vectors. One "unit" of A or B
// is 32 bits: a float, or (Bf16Pair) two bfloat16 numbers whose products are both added, so that k counts pairs.
// Operands are addressed in bytes, because rows of bfloat16 need not start on a multiple of four.
//
// Row-major A (A(r, k) at a + r * a_stride + 4k) serves S^T = K Q^T, dP^T = V dO^T, dV += P^T dO and dK += dS^T Q.
// Column-major A (at a + k * a_stride + 4r) serves O^T += V^T P^T and dQ += dS K.
#pragma once

#include "core/macros.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

struct Float32Unit {
  using Operand = Vf;
  FASTATTN_FN Operand broadcast(const char* p) { return vset(*reinterpret_cast<const float*>(p)); }
  FASTATTN_FN Operand load(const char* p) { return vload(reinterpret_cast<const float*>(p)); }
  FASTATTN_FN Vf multiply_add(Operand a, Operand b, Vf acc) { return vfma(a, b, acc); }
};

#if FASTATTN_BF16_DOT
struct Bf16Pair {
  using Operand = Vi;
  FASTATTN_FN Operand broadcast(const char* p) {
    uint32_t unit;
    __builtin_memcpy(&unit, p, sizeof unit);
    return viset(unit);
  }
  FASTATTN_FN Operand load(const char* p) { return viload(reinterpret_cast<const uint32_t*>(p)); }
  FASTATTN_FN Vf multiply_add(Operand a, Operand b, Vf acc) { return vdot_bf16(acc, a, b); }
};
#endif

// How a product meets what C holds. It is summed by itself first: a running sum as starting value would have every
// product rounded at the size of the whole sum, an error that does not fall with the length as it does for plain code.
enum class Output {
  kReplace,        // C = product
  kAdd,            // C = C + product
  kRescaleAndAdd,  // C = C * lane_scale + product
};

constexpr bool kRowMajorA = false, kColumnMajorA = true;

// Rows of A that keep about 24 (of 32) or 12 (of 16) accumulators busy: enough to hide the latency of a multiply-add,
// and the more rows, the fewer loads of B.
FASTATTN_FN constexpr int row_major_rows(int vectors) {
  if (kPanelVectors == 2) return vectors == 1 ? 8 : 6;
  return vectors == 1 || vectors == 2 ? 12 : vectors == 3 ? 8 : 6;
}
// Column-major A has a multiple of kColumnRows rows, so that padded operands serve all kernels. Six rows leave a rest
// of four or two, for which there are kernels too.
constexpr int kColumnRows = 8;
FASTATTN_FN constexpr int column_major_rows(int vectors) {
  if (kPanelVectors == 2) return vectors == 1 ? 8 : 6;
  return vectors == 4 ? 4 : 8;
}

template <class Unit, bool kColumnMajor, int R, int NV, Output kOutput, bool kTrackMax = false>
FASTATTN_FN void gemm_rows(const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t n, float* c,
                           int64_t c_stride, const float* lane_scale = nullptr, Vf* lane_max = nullptr) {
  Vf acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = vzero();
  }
  // Rows of a row-major A are reached from every third row's pointer with scaled indices, which keeps the pointers in
  // registers.
  const char* row[(R + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (R + 2) / 3; ++i) row[i] = kColumnMajor ? a : a + 3 * i * a_stride;
  for (int64_t k = 0; k < n; ++k) {
    typename Unit::Operand bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = Unit::load(b + v * kLanes * 4);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const char* element = kColumnMajor ? a + r * 4 : row[r / 3] + (r % 3) * a_stride;
      const typename Unit::Operand ar = Unit::broadcast(element);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = Unit::multiply_add(ar, bv[v], acc[r][v]);
    }
    b += b_stride;
    if constexpr (kColumnMajor) {
      a += a_stride;
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < (R + 2) / 3; ++i) row[i] += 4;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    Vf top = kTrackMax ? lane_max[v] : vzero();  // lane_max lives in memory: one update for all rows
    const Vf scale = kOutput == Output::kRescaleAndAdd ? vload(lane_scale + v * kLanes) : vzero();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* to = c + r * c_stride + v * kLanes;
      Vf x = acc[r][v];
      if constexpr (kOutput == Output::kAdd) x = vadd(vload(to), x);
      if constexpr (kOutput == Output::kRescaleAndAdd) x = vfma(vload(to), scale, x);
      vstore(to, x);
      if constexpr (kTrackMax) top = vmax(top, x);
    }
    if constexpr (kTrackMax) lane_max[v] = top;
  }
}

// All `rows` rows of row-major A, C = product. The last rows overlap earlier ones, which are computed again to the same
// bits; rows >= row_major_rows(NV), so callers pad A when they have fewer.
template <class Unit, int NV, bool kTrackMax>
FASTATTN_FN void gemm_row_major(const char* a, int64_t a_stride, int64_t rows, const char* b, int64_t b_stride,
                                int64_t n, float* c, int64_t c_stride, Vf* lane_max) {
  constexpr int R = row_major_rows(NV);
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    gemm_rows<Unit, kRowMajorA, R, NV, Output::kReplace, kTrackMax>(a + r * a_stride, a_stride, b, b_stride, n,
                                                                    c + r * c_stride, c_stride, nullptr, lane_max);
  }
  if (r == rows) return;
  // Tiles under a mask tensor have 64 keys: ten groups of six, and four.
  constexpr int kRest = 4;
  if constexpr (R == 6) {
    if (rows - r == kRest) {
      return gemm_rows<Unit, kRowMajorA, kRest, NV, Output::kReplace, kTrackMax>(
          a + r * a_stride, a_stride, b, b_stride, n, c + r * c_stride, c_stride, nullptr, lane_max);
    }
  }
  r = rows - R;
  gemm_rows<Unit, kRowMajorA, R, NV, Output::kReplace, kTrackMax>(a + r * a_stride, a_stride, b, b_stride, n,
                                                                  c + r * c_stride, c_stride, nullptr, lane_max);
}

// The part [begin, end) of a contraction, in units, that a group of rows needs.
struct UnitSpan {
  int64_t begin, end;
};

// All `rows` rows of row-major A, C += product over the units that span(first_row, row_count) gives for each group. A
// and C are padded to a multiple of row_major_rows(NV) rows.
template <class Unit, int NV, class Span>
FASTATTN_FN void gemm_row_major_accumulate(const char* a, int64_t a_stride, int64_t rows, const char* b,
                                           int64_t b_stride, float* c, int64_t c_stride, const Span& span) {
  constexpr int R = row_major_rows(NV);
  for (int64_t r = 0; r < rows; r += R) {
    const UnitSpan units = span(r, r + R < rows ? R : rows - r);
    if (units.begin >= units.end) continue;
    gemm_rows<Unit, kRowMajorA, R, NV, Output::kAdd>(a + r * a_stride + units.begin * 4, a_stride,
                                                     b + units.begin * b_stride, b_stride, units.end - units.begin,
                                                     c + r * c_stride, c_stride);
  }
}

// All `rows` rows of column-major A over the units that span(first_row, row_count) gives for each group. A and C have
// padded_rows rows, a multiple of kColumnRows.
template <class Unit, int NV, Output kOutput, int R = column_major_rows(NV), class Span>
FASTATTN_FN void gemm_column_major(const char* a, int64_t a_stride, int64_t rows, int64_t padded_rows, const char* b,
                                   int64_t b_stride, float* c, int64_t c_stride, const float* lane_scale,
                                   const Span& span) {
  int64_t r = 0;
  for (; r < rows && r + R <= padded_rows; r += R) {
    const UnitSpan units = span(r, r + R < rows ? R : rows - r);
    if (kOutput == Output::kAdd && units.begin >= units.end) continue;
    gemm_rows<Unit, kColumnMajorA, R, NV, kOutput>(a + r * 4 + units.begin * a_stride, a_stride,
                                                   b + units.begin * b_stride, b_stride, units.end - units.begin,
                                                   c + r * c_stride, c_stride, lane_scale);
  }
  if constexpr (kColumnRows % column_major_rows(NV) != 0 && R > 2) {
    if (r < rows) {
      const auto rest = [&](int64_t first, int64_t count) { return span(r + first, count); };
      gemm_column_major<Unit, NV, kOutput, R - 2>(a + r * 4, a_stride, rows - r, padded_rows - r, b, b_stride,
                                                  c + r * c_stride, c_stride, lane_scale, rest);
    }
  }
}

// Calls body.template run<NV>(first_vector) over `vectors` vectors, kPanelVectors at a time and the rest together.
template <class Body>
FASTATTN_FN void for_each_panel(int vectors, const Body& body) {
  int v = 0;
  for (; v + kPanelVectors <= vectors; v += kPanelVectors) body.template run<kPanelVectors>(v);
  switch (vectors - v) {
    case 1:
      body.template run<1>(v);
      break;
    case 2:
      if constexpr (kPanelVectors > 2) body.template run<2>(v);
      break;
    case 3:
      if constexpr (kPanelVectors > 3) body.template run<3>(v);
      break;
    default:
      break;
  }
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
