// _fastattn_core, third part: hard attention and the summary of attention weights on the CPU engine.
#include "cpu/attention.h"
#include "testing/arrays_hard.h"
#include "testing/module.h"
#include "testing/threads.h"

namespace fastattn::testing {
namespace {

py::dict hard_attention_forward(const py::array& q, const py::array& k, const py::array& v, bool is_sampled,
                                int thread_count, const py::kwargs& kwargs) {
  return hard_forward_arrays(q, k, v, is_sampled, options_from(kwargs), [&](const HardAttentionParams& p) {
    cpu::hard_attention_forward(p, threads(thread_count));
  });
}

py::dict hard_attention_backward(const py::array& q, const py::array& k, const py::array& v, const py::dict& results,
                                 const OptionalArray& d_o, const OptionalArray& d_log_prob, int thread_count,
                                 const py::kwargs& kwargs) {
  return hard_backward_arrays(
      q, k, v, results, d_o, d_log_prob, options_from(kwargs),
      [&](const HardAttentionGradParams& p) { cpu::hard_attention_backward(p, threads(thread_count)); });
}

py::dict attention_summary(const py::array& q, const py::array& k, int64_t top_k, bool key_mass,
                           const OptionalArray& row_mask, int thread_count, const py::kwargs& kwargs) {
  return summary_arrays(q, k, top_k, key_mass, row_mask, options_from(kwargs),
                        [&](const SummaryParams& p) { cpu::attention_summary(p, threads(thread_count)); });
}

}  // namespace

void bind_hard(py::module_& m) {
  m.def("hard_attention_forward", &hard_attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::kw_only(),
        py::arg("is_sampled") = false, py::arg("threads") = 1);
  m.def("hard_attention_backward", &hard_attention_backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("results"), py::kw_only(), py::arg("d_o") = py::none(), py::arg("d_log_prob") = py::none(),
        py::arg("threads") = 1);
  m.def("attention_summary", &attention_summary, py::arg("q"), py::arg("k"), py::kw_only(), py::arg("top_k") = 0,
        py::arg("key_mass") = true, py::arg("row_mask") = py::none(), py::arg("threads") = 1);
}

}  // namespace fastattn::testing
