// _fastattn_core, second part: the CUDA engine's kernels on the emulator, and its plans for real devices.
#include <optional>
#include <string>
#include <vector>

#include "cuda/heuristics.h"
#include "cuda/rows.cuh"
#include "testing/emulation.h"
#include "testing/module.h"

namespace fastattn::testing {
namespace {

void check_is_served(const AttentionParams& p) {
  if (p.dtype == DType::kFloat64) refuse("the CUDA kernels do not compute in float64.");
  if (cuda::head_dim_bucket(p.D, p.Dv) == 0) refuse("the CUDA kernels serve head dims up to 256.");
}

py::dict attention_forward(const py::array& q, const py::array& k, const py::array& v, const py::dict& settings,
                           const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  Run run;
  py::dict results = forward_arrays(q, k, v, options_from(kwargs), [&](const AttentionParams& p) {
    check_is_served(p);
    // As the binding does.
    if (cuda::all_rows(p) == 0) return;
    run = emulation.unswizzled
              ? emulator::attention_forward_unswizzled(p, emulation.options, emulation.os_threads)
              : emulator::attention_forward(p, emulation.device, emulation.options, emulation.os_threads);
  });
  results["run"] = as_dict(run);
  return results;
}

void fill_zero(const py::dict& arrays) {
  for (const auto& [name, array] : arrays) array.attr("fill")(0);
}

py::dict attention_backward(const py::array& d_o, const py::array& q, const py::array& k, const py::array& v,
                            const py::dict& results, const OptionalArray& d_lse, const py::dict& settings,
                            const py::kwargs& kwargs) {
  const Emulation emulation = Emulation::from(settings);
  Run run;
  bool is_empty = false;
  py::dict gradients =
      backward_arrays(d_o, q, k, v, results, d_lse, options_from(kwargs), [&](const AttentionGradParams& g) {
        check_is_served(g.forward);
        is_empty = g.forward.B * cuda::all_rows(g.forward) == 0;
        if (!is_empty) {
          run = emulator::attention_backward(g, emulation.device, emulation.options, emulation.os_threads);
        }
      });
  if (is_empty) fill_zero(gradients);
  gradients["run"] = as_dict(run);
  return gradients;
}

py::array_t<bool> dropout_mask(uint64_t seed, uint64_t offset, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p) {
  py::array_t<bool> mask({B, H, Lq, Lk});
  const int64_t rng_state[2] = {static_cast<int64_t>(seed), static_cast<int64_t>(offset)};
  emulator::dropout_mask(reinterpret_cast<uint8_t*>(mask.mutable_data()), rng_state, B, H, Lq, Lk, p, {}, 1);
  return mask;
}

// The plan for a shape, without pointers: what a real device of these properties would run.
py::dict forward_plan(const std::string& dtype, int64_t B, int64_t Hq, int64_t Hkv, int64_t Lq, int64_t Lk, int64_t D,
                      int64_t Dv, const std::string& causal, Window window, bool has_modifiers, int64_t packed_rows,
                      int multiprocessors, int shared_bytes) {
  AttentionParams p;
  p.packed_rows = packed_rows;
  p.dtype = dtype == "float32" ? DType::kFloat32 : dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat16;
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
  p.causal = causal_from_name(causal);
  p.window_left = window[0];
  p.window_right = window[1];
  const cuda::ForwardPlan plan = cuda::plan_forward(p, has_modifiers, {90, multiprocessors, shared_bytes});
  const cuda::ForwardTiles tiles = cuda::forward_tiles(p.dtype, plan.dim, plan.variant);
  const char* const variants[] = {"plain", "modified", "few_rows"};
  py::dict result;
  result["dim"] = plan.dim;
  result["variant"] = variants[static_cast<int>(plan.variant)];
  result["packed_heads"] = plan.packed_heads;
  result["row_blocks"] = plan.row_blocks;
  result["splits"] = plan.splits;
  result["blocks"] = plan.blocks;
  result["block_m"] = tiles.block_m;
  result["block_n"] = tiles.block_n;
  result["shared_bytes"] = cuda::forward_shared_bytes(p.dtype, plan.dim, tiles);
  return result;
}

// The same for additive scores.
py::dict additive_plan(int64_t B, int64_t Hq, int64_t Lq, int64_t Lk, int64_t Dv, const std::string& causal,
                       int multiprocessors, int shared_bytes) {
  AttentionParams p;
  p.B = B, p.Hq = Hq, p.Lq = Lq, p.Lk = Lk, p.Dv = Dv;
  p.causal = causal_from_name(causal);
  const cuda::ForwardPlan plan = cuda::plan_additive_forward(p, {90, multiprocessors, shared_bytes});
  py::dict result;
  result["row_blocks"] = plan.row_blocks;
  result["splits"] = plan.splits;
  result["blocks"] = plan.blocks;
  result["shared_bytes"] = cuda::additive_shared_bytes(cuda::kAdditiveResident, Dv);
  return result;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("emulated_attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::kw_only(),
        py::arg("emulator") = py::dict());
  m.def("emulated_attention_backward", &attention_backward, py::arg("d_o"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("results"), py::kw_only(), py::arg("d_lse") = py::none(), py::arg("emulator") = py::dict());
  m.def("emulated_dropout_mask", &dropout_mask, py::arg("seed"), py::arg("offset"), py::arg("B"), py::arg("H"),
        py::arg("Lq"), py::arg("Lk"), py::arg("p"));
  m.def("cuda_forward_plan", &forward_plan, py::kw_only(), py::arg("dtype"), py::arg("B"), py::arg("Hq"),
        py::arg("Hkv"), py::arg("Lq"), py::arg("Lk"), py::arg("D"), py::arg("Dv"), py::arg("causal") = "none",
        py::arg("window") = Window{kUnlimited, kUnlimited}, py::arg("has_modifiers") = false,
        py::arg("packed_rows") = 0, py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 227 * 1024);
  m.def("cuda_additive_plan", &additive_plan, py::kw_only(), py::arg("B"), py::arg("Hq"), py::arg("Lq"), py::arg("Lk"),
        py::arg("Dv"), py::arg("causal") = "none", py::arg("multiprocessors") = 132,
        py::arg("shared_bytes") = 227 * 1024);
}

}  // namespace fastattn::testing
