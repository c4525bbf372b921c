// _fastattn_core: the CUDA engine's kernels of hard attention and of the summary, on the emulator.
#include "cuda/walk_plan.h"
#include "testing/arrays_hard.h"
#include "testing/emulation.h"
#include "testing/module.h"

namespace fastattn::testing {
namespace {

void check_is_served(const AttentionParams& p) {
  if (p.dtype == DType::kFloat64) refuse("the CUDA kernels do not compute in float64.");
  if (cuda::walk_dim_bucket(p.D) == 0 || p.Dv > cuda::kMaxHeadDim)
    refuse("the CUDA kernels serve head dims up to 256.");
}

py::dict hard_attention_forward(const py::array& q, const py::array& k, const py::array& v, bool is_sampled,
                                const py::dict& settings, const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  Run run;
  py::dict results = hard_forward_arrays(q, k, v, is_sampled, options_from(kwargs), [&](const HardAttentionParams& p) {
    check_is_served(p.attention);
    run = emulator::hard_attention_forward(p, emulation.device, emulation.options, emulation.os_threads);
  });
  results["run"] = as_dict(run);
  return results;
}

py::dict hard_attention_backward(const py::array& q, const py::array& k, const py::array& v, const py::dict& results,
                                 const OptionalArray& d_o, const OptionalArray& d_log_prob, const py::dict& settings,
                                 const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  Run run;
  py::dict gradients = hard_backward_arrays(
      q, k, v, results, d_o, d_log_prob, options_from(kwargs), [&](const HardAttentionGradParams& g) {
        check_is_served(g.forward);
        run = emulator::hard_attention_backward(g, emulation.device, emulation.options, emulation.os_threads);
      });
  gradients["run"] = as_dict(run);
  return gradients;
}

py::dict attention_summary(const py::array& q, const py::array& k, int64_t top_k, bool key_mass,
                           const OptionalArray& row_mask, const py::dict& settings, const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  Run run;
  py::dict results = summary_arrays(q, k, top_k, key_mass, row_mask, options_from(kwargs), [&](const SummaryParams& p) {
    check_is_served(p.attention);
    run = emulator::attention_summary(p, emulation.device, emulation.options, emulation.os_threads);
  });
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
