// _fastattn_core: the torch-free engine for pytest. Mask geometry, Philox and every kernel, on NumPy arrays.
//
// Arrays are float32, float64, float16, or uint16 that holds bfloat16 bits. Any strides are passed on as they are, so
// the last dimension must be contiguous. Results start out as NaN, which shows what a kernel forgot to write.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/mask.h"
#include "core/philox.h"
#include "cpu/attention.h"
#include "testing/threads.h"

namespace py = pybind11;

namespace {

using fastattn::AttentionGradParams;
using fastattn::AttentionParams;
using fastattn::Causal;
using fastattn::DType;
using fastattn::MaskGeometry;
using fastattn::TileKind;
using fastattn::TileRange;
using fastattn::cpu::Isa;

using Window = std::array<int64_t, 2>;
using OptionalArray = std::optional<py::array>;

[[noreturn]] void refuse(const std::string& text) { throw py::value_error("_fastattn_core: " + text); }

Causal causal_from_name(const std::string& name) {
  if (name == "none") return Causal::kNone;
  if (name == "top_left") return Causal::kTopLeft;
  if (name == "bottom_right") return Causal::kBottomRight;
  refuse("causal is '" + name + "'; it must be none, top_left or bottom_right.");
}

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

// ---- Attention -----------------------------------------------------------------------------------------------------

struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> size, stride;  // in elements
};

DType dtype_of(const py::array& array, const char* name) {
  const py::dtype dtype = array.dtype();
  if (dtype.is(py::dtype::of<float>())) return DType::kFloat32;
  if (dtype.is(py::dtype::of<double>())) return DType::kFloat64;
  if (dtype.is(py::dtype("float16"))) return DType::kFloat16;
  if (dtype.is(py::dtype::of<uint16_t>())) return DType::kBFloat16;
  refuse(std::string(name) + " has dtype " + py::str(dtype).cast<std::string>() +
         "; it must be float32, float64, float16, or uint16 that holds bfloat16.");
}

py::dtype numpy_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return py::dtype::of<double>();
    case DType::kFloat16:
      return py::dtype("float16");
    case DType::kBFloat16:
      return py::dtype::of<uint16_t>();
    default:
      return py::dtype::of<float>();
  }
}

DType accumulator(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Sizes and strides, without a look at the dtype. The array may be read-only: inputs are only ever read.
View shape_view(const py::array& array, const char* name, size_t dimensions) {
  View view;
  view.data = const_cast<void*>(array.data());
  if (static_cast<size_t>(array.ndim()) != dimensions) {
    refuse(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions, not " +
           std::to_string(dimensions) + ".");
  }
  for (py::ssize_t dim = 0; dim < array.ndim(); ++dim) {
    if (array.strides(dim) % array.itemsize() != 0) refuse(std::string(name) + " has a stride of part of an element.");
    view.size.push_back(array.shape(dim));
    view.stride.push_back(array.strides(dim) / array.itemsize());
  }
  return view;
}

View float_view(const py::array& array, const char* name, size_t dimensions) {
  View view = shape_view(array, name, dimensions);
  view.dtype = dtype_of(array, name);
  return view;
}

// [B, H, L, D] with contiguous rows; fills in the strides of the first three dimensions.
View rows_view(const py::array& array, const char* name, DType dtype, std::array<int64_t, 4> size,
               int64_t (&stride)[3]) {
  View view = float_view(array, name, 4);
  if (view.dtype != dtype) refuse(std::string(name) + " does not have q's dtype.");
  for (size_t dim = 0; dim < 4; ++dim) {
    if (view.size[dim] != size[dim]) {
      refuse(std::string(name) + " has size " + std::to_string(view.size[dim]) + " in dimension " +
             std::to_string(dim) + ", not " + std::to_string(size[dim]) + ".");
    }
  }
  // NumPy gives an empty array any strides.
  if (array.size() > 0 && size[3] > 1 && view.stride[3] != 1) {
    refuse(std::string(name) + " must be contiguous in its last dimension.");
  }
  for (size_t dim = 0; dim < 3; ++dim) stride[dim] = view.stride[dim];
  return view;
}

// Broadcastable to (B, Hq, Lq, Lk): dimensions of size 1 get the stride 0.
void broadcast_strides(const View& view, const char* name, const AttentionParams& p, int64_t (&stride)[4]) {
  const int64_t size[4] = {p.B, p.Hq, p.Lq, p.Lk};
  for (size_t dim = 0; dim < 4; ++dim) {
    if (view.size[dim] != 1 && view.size[dim] != size[dim]) {
      refuse(std::string(name) + " has size " + std::to_string(view.size[dim]) + " in dimension " +
             std::to_string(dim) + ", neither 1 nor " + std::to_string(size[dim]) + ".");
    }
    stride[dim] = view.size[dim] == 1 ? 0 : view.stride[dim];
  }
}

// A contiguous vector of `dtype` with `size` elements.
const void* vector_data(const py::array& array, const char* name, DType dtype, int64_t size) {
  const View view = float_view(array, name, 1);
  if (view.dtype != dtype || view.size[0] != size || (size > 1 && view.stride[0] != 1)) {
    refuse(std::string(name) + " must be contiguous, of q's accumulator type, with " + std::to_string(size) +
           " elements.");
  }
  return view.data;
}

// The keyword arguments that forward and backward share.
struct Options {
  std::string causal = "none";
  Window window = {fastattn::kUnlimited, fastattn::kUnlimited};
  std::optional<double> scale;
  double softcap = 0.0;
  OptionalArray bias, mask, alibi_slopes, sinks;
  std::optional<py::array_t<int32_t, py::array::c_style>> kv_lengths;
  double dropout_p = 0.0;
  uint64_t seed = 0, offset = 0;
};

Options options_from(const py::kwargs& kwargs) {
  Options options;
  for (const auto& [key, value] : kwargs) {
    const std::string name = py::cast<std::string>(key);
    if (value.is_none()) continue;
    if (name == "causal") {
      options.causal = py::cast<std::string>(value);
    } else if (name == "window") {
      options.window = py::cast<Window>(value);
    } else if (name == "scale") {
      options.scale = py::cast<double>(value);
    } else if (name == "softcap") {
      options.softcap = py::cast<double>(value);
    } else if (name == "bias") {
      options.bias = py::cast<py::array>(value);
    } else if (name == "mask") {
      options.mask = py::cast<py::array>(value);
    } else if (name == "alibi_slopes") {
      options.alibi_slopes = py::cast<py::array>(value);
    } else if (name == "sinks") {
      options.sinks = py::cast<py::array>(value);
    } else if (name == "kv_lengths") {
      options.kv_lengths = py::cast<py::array_t<int32_t, py::array::c_style>>(value);
    } else if (name == "dropout_p") {
      options.dropout_p = py::cast<double>(value);
    } else if (name == "seed") {
      options.seed = py::cast<uint64_t>(value);
    } else if (name == "offset") {
      options.offset = py::cast<uint64_t>(value);
    } else {
      throw py::type_error("_fastattn_core: there is no argument " + name + ".");
    }
  }
  return options;
}

AttentionParams make_params(const py::array& q, const py::array& k, const py::array& v, const Options& options) {
  AttentionParams p;
  const View q_view = float_view(q, "q", 4), k_view = float_view(k, "k", 4), v_view = float_view(v, "v", 4);
  p.dtype = q_view.dtype;
  p.B = q_view.size[0];
  p.Hq = q_view.size[1];
  p.Lq = q_view.size[2];
  p.D = q_view.size[3];
  p.Hkv = k_view.size[1];
  p.Lk = k_view.size[2];
  p.Dv = v_view.size[3];
  if (p.Hkv == 0 ? p.Hq != 0 : p.Hq % p.Hkv != 0) refuse("q's heads must be a multiple of k's.");
  p.q = rows_view(q, "q", p.dtype, {p.B, p.Hq, p.Lq, p.D}, p.q_stride).data;
  p.k = rows_view(k, "k", p.dtype, {p.B, p.Hkv, p.Lk, p.D}, p.k_stride).data;
  p.v = rows_view(v, "v", p.dtype, {p.B, p.Hkv, p.Lk, p.Dv}, p.v_stride).data;
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D)));
  p.softcap = options.softcap;
  if (options.bias) {
    const View view = float_view(*options.bias, "bias", 4);
    if (view.dtype != p.dtype && view.dtype != DType::kFloat32) refuse("bias must have q's dtype or float32.");
    p.bias = view.data;
    p.bias_dtype = view.dtype;
    broadcast_strides(view, "bias", p, p.bias_stride);
  }
  if (options.mask) {
    if (!options.mask->dtype().is(py::dtype::of<bool>())) refuse("mask must be bool.");
    const View view = shape_view(*options.mask, "mask", 4);
    p.mask = static_cast<const uint8_t*>(view.data);
    broadcast_strides(view, "mask", p, p.mask_stride);
  }
  if (options.alibi_slopes) {
    const bool per_batch = options.alibi_slopes->ndim() == 2;
    const View view = float_view(*options.alibi_slopes, "alibi_slopes", per_batch ? 2 : 1);
    if (view.dtype != accumulator(p.dtype)) refuse("alibi_slopes must be of q's accumulator type.");
    if (view.size.back() != p.Hq || (per_batch && view.size[0] != p.B))
      refuse("alibi_slopes must be (Hq,) or (B, Hq).");
    p.alibi_slopes = view.data;
    p.alibi_stride[0] = per_batch ? view.stride[0] : 0;
    p.alibi_stride[1] = view.stride.back();
  }
  if (options.sinks) p.sinks = vector_data(*options.sinks, "sinks", accumulator(p.dtype), p.Hq);
  if (options.kv_lengths) {
    if (options.kv_lengths->ndim() != 1 || options.kv_lengths->size() != p.B) refuse("kv_lengths must be (B,).");
    p.kv_lengths = options.kv_lengths->data();
    for (int64_t b = 0; b < p.B; ++b) {
      if (p.kv_lengths[b] < 0 || p.kv_lengths[b] > p.Lk) refuse("kv_lengths must lie in [0, Lk].");
    }
  }
  p.causal = causal_from_name(options.causal);
  p.window_left = options.window[0];
  p.window_right = options.window[1];
  p.dropout_p = options.dropout_p;
  p.seed = options.seed;
  p.offset = options.offset;
  return p;
}

py::array make_result(DType dtype, std::vector<py::ssize_t> size) {
  py::array array(numpy_dtype(dtype), std::move(size));
  if (dtype == DType::kBFloat16) {
    array.attr("fill")(0x7fc0);
  } else {
    array.attr("fill")(std::numeric_limits<double>::quiet_NaN());
  }
  return array;
}

void copy_strides(const py::array& array, int64_t (&stride)[3]) {
  for (size_t dim = 0; dim < 3; ++dim) {
    stride[dim] = array.strides(static_cast<py::ssize_t>(dim)) / array.itemsize();
  }
}

py::dict attention_forward(const py::array& q, const py::array& k, const py::array& v, int threads,
                           const py::kwargs& kwargs) {
  const Options options = options_from(kwargs);
  AttentionParams p = make_params(q, k, v, options);
  const DType stat = accumulator(p.dtype);
  py::array o = make_result(p.dtype, {p.B, p.Hq, p.Lq, p.Dv});
  py::array lse = make_result(stat, {p.B, p.Hq, p.Lq});
  py::array row_max = make_result(stat, {p.B, p.Hq, p.Lq});
  py::array row_sum = make_result(stat, {p.B, p.Hq, p.Lq});
  p.o = o.mutable_data();
  copy_strides(o, p.o_stride);
  p.lse = lse.mutable_data();
  p.row_max = row_max.mutable_data();
  p.row_sum = row_sum.mutable_data();
  {
    py::gil_scoped_release others_may_run;
    fastattn::cpu::attention_forward(p, fastattn::testing::threads(threads));
  }
  py::dict results;
  results["o"] = o;
  results["lse"] = lse;
  results["row_max"] = row_max;
  results["row_sum"] = row_sum;
  return results;
}

// `results` is what attention_forward returned for the same arguments.
py::dict attention_backward(const py::array& d_o, const py::array& q, const py::array& k, const py::array& v,
                            const py::dict& results, const OptionalArray& d_lse, int threads,
                            const py::kwargs& kwargs) {
  const Options options = options_from(kwargs);
  AttentionGradParams g;
  g.forward = make_params(q, k, v, options);
  AttentionParams& p = g.forward;
  const DType stat = accumulator(p.dtype);
  const auto stats_of = [&](const py::array& array, const char* name) {
    return vector_data(array.attr("reshape")(-1).cast<py::array>(), name, stat, p.B * p.Hq * p.Lq);
  };
  const py::array o = results["o"].cast<py::array>();
  const py::array row_max = results["row_max"].cast<py::array>(), row_sum = results["row_sum"].cast<py::array>();
  p.o = rows_view(o, "o", p.dtype, {p.B, p.Hq, p.Lq, p.Dv}, p.o_stride).data;
  p.row_max = const_cast<void*>(stats_of(row_max, "row_max"));
  p.row_sum = const_cast<void*>(stats_of(row_sum, "row_sum"));
  g.d_o = rows_view(d_o, "d_o", p.dtype, {p.B, p.Hq, p.Lq, p.Dv}, g.d_o_stride).data;
  if (d_lse) g.d_lse = stats_of(*d_lse, "d_lse");

  py::dict gradients;
  const auto add = [&](const char* name, py::array array) {
    gradients[name] = array;
    return array.mutable_data();
  };
  g.dq = add("dq", make_result(p.dtype, {p.B, p.Hq, p.Lq, p.D}));
  g.dk = add("dk", make_result(p.dtype, {p.B, p.Hkv, p.Lk, p.D}));
  g.dv = add("dv", make_result(p.dtype, {p.B, p.Hkv, p.Lk, p.Dv}));
  copy_strides(gradients["dq"].cast<py::array>(), g.dq_stride);
  copy_strides(gradients["dk"].cast<py::array>(), g.dk_stride);
  copy_strides(gradients["dv"].cast<py::array>(), g.dv_stride);
  if (options.bias) {
    const py::array& bias = *options.bias;
    py::array d_bias = make_result(stat, std::vector<py::ssize_t>(bias.shape(), bias.shape() + 4));
    g.d_bias = add("d_bias", d_bias);
    broadcast_strides(float_view(d_bias, "d_bias", 4), "d_bias", p, g.d_bias_stride);
  }
  if (options.sinks) g.d_sinks = add("d_sinks", make_result(stat, {p.Hq}));
  {
    py::gil_scoped_release others_may_run;
    fastattn::cpu::attention_backward(g, fastattn::testing::threads(threads));
  }
  return gradients;
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
}
