// The end of a row of the forward pass: the sink joins, and what the row leaves behind for the caller and for the
// backward pass. Shared by the forward kernel and by the kernel that combines splits.
#pragma once

#include "core/params.h"
#include "core/softmax.h"
#include "cuda/ptx.cuh"

namespace fastattn::cuda {

struct FinishedRow {
  SoftmaxState<float> state;  // with the sink
  float factor;               // of the row's sum of weighted values: to the final maximum, and divided by l
};

// h: the query head, whose sink it is.
FASTATTN_DEVICE FinishedRow finish_row(const AttentionParams& a, SoftmaxState<float> state, int h) {
  FinishedRow row = {state, 0.0f};
  if (a.sinks) row.state = softmax_add_sink(state, static_cast<const float*>(a.sinks)[h]);
  // A row that has seen nothing has l = 0, and its output is 0.
  if (row.state.l != 0.0f) row.factor = softmax_weight(state.m, row.state.m) / row.state.l;
  return row;
}

// at: index into [B, Hq, Lq].
FASTATTN_DEVICE void write_statistics(const AttentionParams& a, const FinishedRow& row, int64_t at) {
  if (a.lse) static_cast<float*>(a.lse)[at] = softmax_lse(row.state);
  if (a.row_max) static_cast<float*>(a.row_max)[at] = row.state.m;
  if (a.row_sum) static_cast<float*>(a.row_sum)[at] = row.state.l;
}

}  // namespace fastattn::cuda
