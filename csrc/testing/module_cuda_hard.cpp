// _fastattn_core: the CUDA engine's kernels of hard attention and of the summary, on the emulator.
#include <optional>
#include <utility>

#include "cuda/walk_plan.h"
#include "testing/emulation.h"
#include "testing/module.h"

namespace fastattn::testing {
namespace {

void check_is_served(const AttentionParams& p) {
  if (p.dtype == DType::kFloat64) refuse("the CUDA kernels do not compute in float64.");
  if (cuda::walk_dim_bucket(p.D) == 0 || p.Dv > cuda::kMaxHeadDim)
    refuse("the CUDA kernels serve head dims up to 256.");
}

py::array filled(py::dtype dtype, std::vector<py::ssize_t> size, double value) {
  py::array array(std::move(dtype), std::move(size));
  array.attr("fill")(value);
  return array;
}

py::dict hard_attention_forward(const py::array& q, const py::array& k, const py::array& v, bool is_sampled,
                                const py::dict& settings, const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  Run run;
  HardAttentionParams hard;
  hard.is_sampled = is_sampled;
  py::array index, log_prob;
  py::dict results = forward_arrays(q, k, v, options_from(kwargs), [&](const AttentionParams& p) {
    check_is_served(p);
    hard.attention = p;
    hard.attention.lse = nullptr;
    {
      const py::gil_scoped_acquire for_arrays;
      index = filled(py::dtype::of<int64_t>(), {p.B, p.Hq, p.Lq}, -77);
      log_prob = make_result(DType::kFloat32, {p.B, p.Hq, p.Lq});
      hard.index = static_cast<int64_t*>(index.mutable_data());
      hard.log_prob = log_prob.mutable_data();
    }
    // As the binding does.
    if (p.B * p.Hq * p.Lq == 0) return;
    run = emulator::hard_attention_forward(hard, emulation.device, emulation.options, emulation.os_threads);
  });
  results.attr("pop")("lse");
  results["index"] = index;
  results["log_prob"] = log_prob;
  results["run"] = as_dict(run);
  return results;
}

py::dict hard_attention_backward(const py::array& q, const py::array& k, const py::array& v, const py::dict& results,
                                 const OptionalArray& d_o, const OptionalArray& d_log_prob, const py::dict& settings,
                                 const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  HardAttentionGradParams g;
  AttentionParams& p = g.forward;
  p = make_params(q, k, v, options_from(kwargs));
  check_is_served(p);
  const int64_t rows = p.B * p.Hq * p.Lq;
  const auto rows_of = [&](const py::array& array, const char* name) {
    return vector_data(array.attr("reshape")(-1).cast<py::array>(), name, DType::kFloat32, rows);
  };
  const py::array row_max = results["row_max"].cast<py::array>(), row_sum = results["row_sum"].cast<py::array>();
  const auto index = results["index"].cast<py::array_t<int64_t, py::array::c_style>>();
  p.row_max = const_cast<void*>(rows_of(row_max, "row_max"));
  p.row_sum = const_cast<void*>(rows_of(row_sum, "row_sum"));
  g.index = index.data();
  if (d_log_prob) g.d_log_prob = rows_of(*d_log_prob, "d_log_prob");
  if (d_o) g.d_o = rows_view(*d_o, "d_o", p.dtype, {p.B, p.Hq, p.Lq, p.Dv}, g.d_o_stride).data;
  py::array dq = make_result(p.dtype, {p.B, p.Hq, p.Lq, p.D}), dk = make_result(p.dtype, {p.B, p.Hkv, p.Lk, p.D});
  py::array dv = make_result(p.dtype, {p.B, p.Hkv, p.Lk, p.Dv});
  g.dq = dq.mutable_data();
  g.dk = dk.mutable_data();
  g.dv = dv.mutable_data();
  copy_strides(dq, g.dq_stride);
  copy_strides(dk, g.dk_stride);
  copy_strides(dv, g.dv_stride);
  Run run;
  {
    const py::gil_scoped_release others_may_run;
    run = emulator::hard_attention_backward(g, emulation.device, emulation.options, emulation.os_threads);
  }
  py::dict gradients;
  gradients["dq"] = dq;
  gradients["dk"] = dk;
  gradients["dv"] = dv;
  gradients["run"] = as_dict(run);
  return gradients;
}

py::dict attention_summary(const py::array& q, const py::array& k, int64_t top_k, bool key_mass,
                           const OptionalArray& row_mask, const py::dict& settings, const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  SummaryParams summary;
  AttentionParams& p = summary.attention;
  p = make_params(q, k, k, options_from(kwargs));
  p.v = nullptr;
  p.Dv = 0;
  check_is_served(p);
  if (top_k < 0 || top_k > kMaxTopK) refuse("top_k must lie in [0, 128].");

  py::dict results;
  const auto add = [&](const char* name, py::array array) {
    results[name] = array;
    return array.mutable_data();
  };
  const std::vector<py::ssize_t> rows = {p.B, p.Hq, p.Lq};
  summary.entropy = add("entropy", make_result(DType::kFloat32, rows));
  summary.max_weight = add("max_weight", make_result(DType::kFloat32, rows));
  p.lse = add("lse", make_result(DType::kFloat32, rows));
  p.row_max = add("row_max", make_result(DType::kFloat32, rows));
  p.row_sum = add("row_sum", make_result(DType::kFloat32, rows));
  summary.top_k = top_k;
  void* const top_weights = add("top_weights", make_result(DType::kFloat32, {p.B, p.Hq, p.Lq, top_k}));
  void* const top_index = add("top_index", filled(py::dtype::of<int64_t>(), {p.B, p.Hq, p.Lq, top_k}, -77));
  if (top_k > 0) {
    summary.top_weights = top_weights;
    summary.top_index = static_cast<int64_t*>(top_index);
  }
  if (key_mass) summary.key_mass = add("key_mass", make_result(DType::kFloat32, {p.B, p.Hq, p.Lk}));
  if (row_mask) {
    if (!row_mask->dtype().is(py::dtype::of<bool>())) refuse("row_mask must be bool.");
    const View view = shape_view(*row_mask, "row_mask", 3);
    for (size_t dim = 0; dim < 3; ++dim) {
      if (view.size[dim] != 1 && view.size[dim] != rows[dim]) refuse("row_mask must be broadcastable to (B, Hq, Lq).");
      summary.row_mask_stride[dim] = view.size[dim] == 1 ? 0 : view.stride[dim];
    }
    summary.row_mask = static_cast<const uint8_t*>(view.data);
  }
  Run run;
  {
    const py::gil_scoped_release others_may_run;
    run = emulator::attention_summary(summary, emulation.device, emulation.options, emulation.os_threads);
  }
  results["run"] = as_dict(run);
  return results;
}

// The plan for a shape, without pointers: what a real device of these properties would run.
py::dict hard_forward_plan(const std::string& dtype, int64_t B, int64_t Hq, int64_t Lq, int64_t Lk, int64_t D,
                           int multiprocessors, int shared_bytes) {
  AttentionParams p;
  p.dtype = dtype == "float32" ? DType::kFloat32 : dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat16;
  p.B = B, p.Hq = p.Hkv = Hq, p.Lq = Lq, p.Lk = Lk, p.D = p.Dv = D;
  const cuda::WalkPlan plan = cuda::plan_hard_forward(p, {90, multiprocessors, shared_bytes});
  const cuda::WalkTiles tiles = cuda::walk_tiles(p.dtype, plan.dim);
  py::dict result;
  result["dim"] = plan.dim;
  result["row_blocks"] = plan.row_blocks;
  result["key_blocks"] = plan.key_blocks;
  result["splits"] = plan.splits;
  result["resident"] = tiles.resident;
  result["streamed"] = tiles.streamed;
  return result;
}

}  // namespace

void bind_cuda_hard(py::module_& m) {
  m.def("emulated_hard_attention_forward", &hard_attention_forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::kw_only(), py::arg("is_sampled") = false, py::arg("emulator") = py::dict());
  m.def("emulated_hard_attention_backward", &hard_attention_backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("results"), py::kw_only(), py::arg("d_o") = py::none(), py::arg("d_log_prob") = py::none(),
        py::arg("emulator") = py::dict());
  m.def("emulated_attention_summary", &attention_summary, py::arg("q"), py::arg("k"), py::kw_only(),
        py::arg("top_k") = 0, py::arg("key_mass") = true, py::arg("row_mask") = py::none(),
        py::arg("emulator") = py::dict());
  m.def("cuda_hard_forward_plan", &hard_forward_plan, py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("Hq"),
        py::arg("Lq"), py::arg("Lk"), py::arg("D"), py::arg("multiprocessors") = 132,
        py::arg("shared_bytes") = 227 * 1024);
}

}  // namespace fastattn::testing
