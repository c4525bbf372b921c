// arrays.h for hard attention and for the summary of attention weights.
#pragma once

#include "testing/arrays.h"

namespace fastattn::testing {

inline py::array make_index(std::vector<py::ssize_t> size) {
  py::array array(py::dtype::of<int64_t>(), std::move(size));
  array.attr("fill")(std::numeric_limits<int64_t>::min());
  return array;
}

// What a forward call returns: o, index, log_prob, row_max and row_sum. run(params) computes it, without Python's lock.
template <class Run>
py::dict hard_forward_arrays(const py::array& q, const py::array& k, const py::array& v, bool is_sampled,
                             const Options& options, Run run) {
  HardAttentionParams hp;
  AttentionParams& p = hp.attention;
  p = make_params(q, k, v, options);
  hp.is_sampled = is_sampled;
  const DType stat = accumulator(p.dtype);
  py::array o = make_result(p.dtype, {p.B, p.Hq, p.Lq, p.Dv});
  py::array index = make_index({p.B, p.Hq, p.Lq});
  py::array log_prob = make_result(stat, {p.B, p.Hq, p.Lq});
  py::array row_max = make_result(stat, {p.B, p.Hq, p.Lq});
  py::array row_sum = make_result(stat, {p.B, p.Hq, p.Lq});
  p.o = o.mutable_data();
  copy_strides(o, p.o_stride);
  hp.index = static_cast<int64_t*>(index.mutable_data());
  hp.log_prob = log_prob.mutable_data();
  p.row_max = row_max.mutable_data();
  p.row_sum = row_sum.mutable_data();
  {
    py::gil_scoped_release others_may_run;
    run(static_cast<const HardAttentionParams&>(hp));
  }
  py::dict results;
  results["o"] = o;
  results["index"] = index;
  results["log_prob"] = log_prob;
  results["row_max"] = row_max;
  results["row_sum"] = row_sum;
  return results;
}

// What a backward call returns: dq, dk and dv; `results` is what the forward call returned for the same arguments.
template <class Run>
py::dict hard_backward_arrays(const py::array& q, const py::array& k, const py::array& v, const py::dict& results,
                              const OptionalArray& d_o, const OptionalArray& d_log_prob, const Options& options,
                              Run run) {
  HardAttentionGradParams hp;
  AttentionParams& p = hp.forward;
  p = make_params(q, k, v, options);
  const DType stat = accumulator(p.dtype);
  const int64_t rows = p.B * p.Hq * p.Lq;
  const auto stats_of = [&](const py::array& array, const char* name) {
    return vector_data(array.attr("reshape")(-1).cast<py::array>(), name, stat, rows);
  };
  const py::array row_max = results["row_max"].cast<py::array>(), row_sum = results["row_sum"].cast<py::array>();
  p.row_max = const_cast<void*>(stats_of(row_max, "row_max"));
  p.row_sum = const_cast<void*>(stats_of(row_sum, "row_sum"));
  const auto index = results["index"].cast<py::array_t<int64_t, py::array::c_style>>();
  if (index.size() != rows) refuse("index must have as many elements as q has rows.");
  for (int64_t row = 0; row < rows; ++row) {
    if (index.data()[row] < -1 || index.data()[row] >= p.Lk) refuse("index must lie in [-1, Lk).");
  }
  hp.index = index.data();
  if (d_o) hp.d_o = rows_view(*d_o, "d_o", p.dtype, {p.B, p.Hq, p.Lq, p.Dv}, hp.d_o_stride).data;
  if (d_log_prob) hp.d_log_prob = stats_of(*d_log_prob, "d_log_prob");

  py::array dq = make_result(p.dtype, {p.B, p.Hq, p.Lq, p.D});
  py::array dk = make_result(p.dtype, {p.B, p.Hkv, p.Lk, p.D});
  py::array dv = make_result(p.dtype, {p.B, p.Hkv, p.Lk, p.Dv});
  hp.dq = dq.mutable_data();
  hp.dk = dk.mutable_data();
  hp.dv = dv.mutable_data();
  copy_strides(dq, hp.dq_stride);
  copy_strides(dk, hp.dk_stride);
  copy_strides(dv, hp.dv_stride);
  {
    py::gil_scoped_release others_may_run;
    run(static_cast<const HardAttentionGradParams&>(hp));
  }
  py::dict gradients;
  gradients["dq"] = dq;
  gradients["dk"] = dk;
  gradients["dv"] = dv;
  return gradients;
}

// What a summary returns; key_mass only where it is wanted.
template <class Run>
py::dict summary_arrays(const py::array& q, const py::array& k, int64_t top_k, bool wants_mass,
                        const OptionalArray& row_mask, const Options& options, Run run) {
  SummaryParams sp;
  AttentionParams& p = sp.attention;
  p = make_params(q, k, {}, options);
  if (top_k < 0 || top_k > kMaxTopK) refuse("top_k must lie in [0, " + std::to_string(kMaxTopK) + "].");
  sp.top_k = top_k;
  const DType stat = accumulator(p.dtype);
  py::dict results;
  const auto add = [&](const char* name, py::array array) {
    results[name] = array;
    return array.mutable_data();
  };
  sp.entropy = add("entropy", make_result(stat, {p.B, p.Hq, p.Lq}));
  sp.max_weight = add("max_weight", make_result(stat, {p.B, p.Hq, p.Lq}));
  sp.top_weights = add("top_weights", make_result(stat, {p.B, p.Hq, p.Lq, top_k}));
  sp.top_index = static_cast<int64_t*>(add("top_index", make_index({p.B, p.Hq, p.Lq, top_k})));
  if (wants_mass) sp.key_mass = add("key_mass", make_result(stat, {p.B, p.Hq, p.Lk}));
  p.lse = add("lse", make_result(stat, {p.B, p.Hq, p.Lq}));
  p.row_max = add("row_max", make_result(stat, {p.B, p.Hq, p.Lq}));
  p.row_sum = add("row_sum", make_result(stat, {p.B, p.Hq, p.Lq}));
  if (row_mask) {
    if (!row_mask->dtype().is(py::dtype::of<bool>())) refuse("row_mask must be bool.");
    const View view = shape_view(*row_mask, "row_mask", 3);
    const int64_t size[3] = {p.B, p.Hq, p.Lq};
    for (size_t dim = 0; dim < 3; ++dim) {
      if (view.size[dim] != 1 && view.size[dim] != size[dim]) refuse("row_mask must be broadcastable to (B, Hq, Lq).");
      sp.row_mask_stride[dim] = view.size[dim] == 1 ? 0 : view.stride[dim];
    }
    sp.row_mask = static_cast<const uint8_t*>(view.data);
  }
  {
    py::gil_scoped_release others_may_run;
    run(static_cast<const SummaryParams&>(sp));
  }
  return results;
}

}  // namespace fastattn::testing
