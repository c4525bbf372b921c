// _fastattn_core: the torch-free engines for pytest. Mask geometry, Philox and attention on the CPU here; hard
// attention and the summary in module_hard.cpp; the CUDA kernels, emulated, in module_cuda.cpp. All on NumPy arrays:
// see arrays.h.
#include "testing/module.h"

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "core/mask.h"
#include "core/philox.h"
#include "cpu/attention.h"
#include "testing/arrays.h"
#include "testing/threads.h"

namespace py = pybind11;

namespace {

using fastattn::AttentionGradParams;
using fastattn::AttentionParams;
using fastattn::Causal;
using fastattn::MaskGeometry;
using fastattn::TileKind;
using fastattn::TileRange;
using fastattn::cpu::Isa;
using fastattn::testing::backward_arrays;
using fastattn::testing::causal_from_name;
using fastattn::testing::forward_arrays;
using fastattn::testing::OptionalArray;
using fastattn::testing::options_from;
using fastattn::testing::refuse;
using fastattn::testing::Window;

// ---- Mask geometry -------------------------------------------------------------------------------------------------

MaskGeometry make_geometry(int64_t Lq, int64_t Lk, const std::string& causal, Window window,
                           std::optional<int32_t> kv_length) {
  AttentionParams p;
  p.B = p.Hq = p.Hkv = 1;
  p.Lq = Lq;
  p.Lk = Lk;
  p.causal = causal_from_name(causal);
  p.window_left = window[0];
  p.window_right = window[1];
  if (kv_length) p.kv_lengths = &*kv_length;
  return mask_geometry(p, 0);
}

py::tuple as_tuple(const TileRange& range) {
  return py::make_tuple(range.begin, range.end, range.full_begin, range.full_end);
}

const char* tile_kind_name(TileKind kind) {
  return kind == TileKind::kSkip ? "skip" : kind == TileKind::kFull ? "full" : "partial";
}

// ---- Dropout -------------------------------------------------------------------------------------------------------

py::array_t<bool> dropout_mask(uint64_t seed, uint64_t offset, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p) {
  py::array_t<bool> mask({B, H, Lq, Lk});
  bool* kept = mask.mutable_data();
  const uint32_t threshold = fastattn::dropout_threshold(p);
  for (int64_t bh = 0; bh < B * H; ++bh) {
    for (int64_t i = 0; i < Lq; ++i) {
      for (int64_t j = 0; j < Lk; ++j) {
        *kept++ = p < 1.0 && fastattn::dropout_keeps(seed, offset, bh, i, j, threshold);
      }
    }
  }
  return mask;
}

// ---- The CPU engine ------------------------------------------------------------------------------------------------

py::dict attention_forward(const py::array& q, const py::array& k, const py::array& v, int threads,
                           const py::kwargs& kwargs) {
  return forward_arrays(q, k, v, options_from(kwargs), [&](const AttentionParams& p) {
    fastattn::cpu::attention_forward(p, fastattn::testing::threads(threads));
  });
}

py::dict attention_backward(const py::array& d_o, const py::array& q, const py::array& k, const py::array& v,
                            const py::dict& results, const OptionalArray& d_lse, int threads,
                            const py::kwargs& kwargs) {
  return backward_arrays(d_o, q, k, v, results, d_lse, options_from(kwargs), [&](const AttentionGradParams& g) {
    fastattn::cpu::attention_backward(g, fastattn::testing::threads(threads));
  });
}

// ---- Instruction sets ----------------------------------------------------------------------------------------------

std::vector<std::string> isa_names(bool only_supported) {
  std::vector<std::string> names;
  for (int level = 0; level < fastattn::cpu::kIsaCount; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!only_supported || fastattn::cpu::isa_supported(isa)) names.push_back(fastattn::cpu::isa_name(isa));
  }
  return names;
}

void set_isa(const std::string& name) {
  Isa isa;
  if (!fastattn::cpu::isa_from_name(name.c_str(), &isa)) refuse("there is no instruction set '" + name + "'.");
  if (!fastattn::cpu::isa_supported(isa)) refuse("this processor or build does not support '" + name + "'.");
  fastattn::cpu::set_active_isa(isa);
}

}  // namespace

PYBIND11_MODULE(_fastattn_core, m) {
  m.doc() = "The torch-free engine of fastattn, for its tests.";

  py::class_<MaskGeometry>(m, "MaskGeometry")
      .def(py::init(&make_geometry), py::arg("Lq"), py::arg("Lk"), py::arg("causal") = "none",
           py::arg("window") = Window{fastattn::kUnlimited, fastattn::kUnlimited}, py::arg("kv_length") = py::none())
      .def("lo", [](const MaskGeometry& g, int64_t i) { return lo(g, i); })
      .def("hi", [](const MaskGeometry& g, int64_t i) { return hi(g, i); })
      .def("keep", [](const MaskGeometry& g, int64_t i, int64_t j) { return keep(g, i, j); })
      .def("key_range", [](const MaskGeometry& g, int64_t i0, int64_t i1) { return as_tuple(key_range(g, i0, i1)); })
      .def("row_range", [](const MaskGeometry& g, int64_t j0, int64_t j1) { return as_tuple(row_range(g, j0, j1)); })
      .def("classify_tile", [](const MaskGeometry& g, int64_t i0, int64_t i1, int64_t j0,
                               int64_t j1) { return tile_kind_name(classify_tile(g, i0, i1, j0, j1)); })
      .def("visible_pairs", [](const MaskGeometry& g) { return visible_pairs(g); });

  m.def(
      "philox4x32",
      [](uint64_t seed, std::array<uint32_t, 4> counter) {
        const auto words = fastattn::philox4x32(seed, counter[0], counter[1], counter[2], counter[3]);
        return std::array<uint32_t, 4>{words.w[0], words.w[1], words.w[2], words.w[3]};
      },
      py::arg("seed"), py::arg("counter"));
  m.def("dropout_threshold", [](double p) { return fastattn::dropout_threshold(p); }, py::arg("p"));
  m.def("dropout_mask", &dropout_mask, py::arg("seed"), py::arg("offset"), py::arg("B"), py::arg("H"), py::arg("Lq"),
        py::arg("Lk"), py::arg("p"));

  m.def("attention_forward", &attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::kw_only(),
        py::arg("threads") = 1);
  m.def("attention_backward", &attention_backward, py::arg("d_o"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("results"), py::kw_only(), py::arg("d_lse") = py::none(), py::arg("threads") = 1);

  m.def("all_isas", [] { return isa_names(false); });
  m.def("supported_isas", [] { return isa_names(true); });
  m.def("best_isa", [] { return std::string(fastattn::cpu::isa_name(fastattn::cpu::best_isa())); });
  m.def("active_isa", [] { return std::string(fastattn::cpu::isa_name(fastattn::cpu::active_isa())); });
  m.def("set_isa", &set_isa, py::arg("name"));

  fastattn::testing::bind_hard(m);
  fastattn::testing::bind_cuda(m);
  fastattn::testing::bind_cuda_cache(m);
  fastattn::testing::bind_cuda_hard(m);
}
