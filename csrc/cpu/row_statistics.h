// The statistics of a row that a caller may ask for: lse, and the maximum and the sum it is made of.
#pragma once

#include "core/params.h"
#include "core/sequence.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

// m is the maximum of the row's scores and l the sum of e^(s - m). A row that sees nothing has l = 0, and m = -inf.
inline void write_row_statistics(const AttentionParams& p, int64_t b, int64_t hq, int64_t i, float m, float l) {
  const int64_t at = stat_index(p, b, hq, i);
  if (p.lse != nullptr) static_cast<float*>(p.lse)[at] = l == 0.0f ? m : m + __builtin_logf(l);
  if (p.row_max != nullptr) static_cast<float*>(p.row_max)[at] = m;
  if (p.row_sum != nullptr) static_cast<float*>(p.row_sum)[at] = l;
}

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
