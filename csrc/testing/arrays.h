// NumPy arrays to the engine's params and back, for the test module's functions.
//
// Packed sequences are (1, H, total, D) with cu_seqlens and max_seqlens; results are of that shape too. A cache is k
// and v in pages, with a block_table, or of int8, with scales, or both.
//
// Arrays are float32, float64, float16, or uint16 that holds bfloat16 bits. Any strides are passed on as they are, so
// the last dimension must be contiguous. Results start out as NaN, which shows what a kernel forgot to write.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/params.h"

namespace fastattn::testing {

namespace py = pybind11;

using Window = std::array<int64_t, 2>;
using OptionalArray = std::optional<py::array>;

[[noreturn]] inline void refuse(const std::string& text) { throw py::value_error("_fastattn_core: " + text); }

inline Causal causal_from_name(const std::string& name) {
  if (name == "none") return Causal::kNone;
  if (name == "top_left") return Causal::kTopLeft;
  if (name == "bottom_right") return Causal::kBottomRight;
  refuse("causal is '" + name + "'; it must be none, top_left or bottom_right.");
}

struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> size, stride;  // in elements
};

inline DType dtype_of(const py::array& array, const char* name) {
  const py::dtype dtype = array.dtype();
  if (dtype.is(py::dtype::of<float>())) return DType::kFloat32;
  if (dtype.is(py::dtype::of<double>())) return DType::kFloat64;
  if (dtype.is(py::dtype("float16"))) return DType::kFloat16;
  if (dtype.is(py::dtype::of<uint16_t>())) return DType::kBFloat16;
  refuse(std::string(name) + " has dtype " + py::str(dtype).cast<std::string>() +
         "; it must be float32, float64, float16, or uint16 that holds bfloat16.");
}

inline py::dtype numpy_dtype(DType dtype) {
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

inline DType accumulator(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// Sizes and strides, without a look at the dtype. The array may be read-only: inputs are only ever read.
inline View shape_view(const py::array& array, const char* name, size_t dimensions) {
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

inline View float_view(const py::array& array, const char* name, size_t dimensions) {
  View view = shape_view(array, name, dimensions);
  view.dtype = dtype_of(array, name);
  return view;
}

// [B, H, L, D] with contiguous rows; fills in the strides of the first three dimensions.
inline View rows_view(const py::array& array, const char* name, DType dtype, std::array<int64_t, 4> size,
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
inline void broadcast_strides(const View& view, const char* name, const AttentionParams& p, int64_t (&stride)[4]) {
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
inline const void* vector_data(const py::array& array, const char* name, DType dtype, int64_t size) {
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
  Window window = {kUnlimited, kUnlimited};
  std::optional<double> scale;
  double softcap = 0.0;
  OptionalArray w, bias, mask, alibi_slopes, sinks;
  std::optional<py::array_t<int32_t, py::array::c_style>> kv_lengths, cu_seqlens_q, cu_seqlens_k, block_table;
  Window max_seqlens = {};  // of queries and keys
  OptionalArray k_scale, v_scale;
  double dropout_p = 0.0;
  uint64_t seed = 0, offset = 0;
};

inline Options options_from(const py::kwargs& kwargs) {
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
    } else if (name == "w") {
      options.w = py::cast<py::array>(value);
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
    } else if (name == "cu_seqlens_q") {
      options.cu_seqlens_q = py::cast<py::array_t<int32_t, py::array::c_style>>(value);
    } else if (name == "cu_seqlens_k") {
      options.cu_seqlens_k = py::cast<py::array_t<int32_t, py::array::c_style>>(value);
    } else if (name == "max_seqlens") {
      options.max_seqlens = py::cast<Window>(value);
    } else if (name == "block_table") {
      options.block_table = py::cast<py::array_t<int32_t, py::array::c_style>>(value);
    } else if (name == "k_scale") {
      options.k_scale = py::cast<py::array>(value);
    } else if (name == "v_scale") {
      options.v_scale = py::cast<py::array>(value);
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

// k or v, whatever their rows are made of: [first, Hkv, rows, dim].
inline void* cache_data(const py::array& array, const char* name, DType dtype, const OptionalArray& scale,
                        int64_t first, int64_t Hkv, int64_t rows, int64_t dim, int64_t (&stride)[3]) {
  if (!scale) return rows_view(array, name, dtype, {first, Hkv, rows, dim}, stride).data;
  if (!array.dtype().is(py::dtype::of<int8_t>())) refuse(std::string(name) + " has scales, and must be int8.");
  const View view = shape_view(array, name, 4);
  if (view.size != std::vector<int64_t>{first, Hkv, rows, dim}) refuse(std::string(name) + " has another size.");
  for (size_t i = 0; i < 3; ++i) stride[i] = view.stride[i];
  return view.data;
}
inline float* scale_data(const py::array& array, const char* name, int64_t first, int64_t Hkv, int64_t rows,
                         int64_t (&stride)[3]) {
  const View view = float_view(array, name, 3);
  if (view.dtype != DType::kFloat32 || view.size != std::vector<int64_t>{first, Hkv, rows}) {
    refuse(std::string(name) + " must be float32, with an element for each row.");
  }
  for (size_t i = 0; i < 3; ++i) stride[i] = view.stride[i];
  return static_cast<float*>(view.data);
}

// v may be missing, where nothing takes values: Dv is 0 then.
inline AttentionParams make_params(const py::array& q, const py::array& k, const OptionalArray& v,
                                   const Options& options) {
  AttentionParams p;
  const View q_view = float_view(q, "q", 4), k_view = shape_view(k, "k", 4);
  p.dtype = q_view.dtype;
  p.B = q_view.size[0];
  p.Hq = q_view.size[1];
  p.Lq = q_view.size[2];
  p.D = q_view.size[3];
  p.Hkv = k_view.size[1];
  p.Lk = k_view.size[2];
  if (p.Hkv == 0 ? p.Hq != 0 : p.Hq % p.Hkv != 0) refuse("q's heads must be a multiple of k's.");
  p.q = rows_view(q, "q", p.dtype, {p.B, p.Hq, p.Lq, p.D}, p.q_stride).data;
  const int64_t first = options.block_table ? k_view.size[0] : p.B;
  p.k = cache_data(k, "k", p.dtype, options.k_scale, first, p.Hkv, p.Lk, p.D, p.k_stride);
  if (v) {
    p.Dv = shape_view(*v, "v", 4).size[3];
    p.v = cache_data(*v, "v", p.dtype, options.v_scale, first, p.Hkv, p.Lk, p.Dv, p.v_stride);
  }
  if (options.k_scale.has_value() != options.v_scale.has_value()) refuse("k_scale and v_scale: both or none.");
  if (options.k_scale) {
    p.k_scale = scale_data(*options.k_scale, "k_scale", first, p.Hkv, p.Lk, p.k_scale_stride);
    p.v_scale = scale_data(*options.v_scale, "v_scale", first, p.Hkv, p.Lk, p.v_scale_stride);
  }
  if (options.block_table) {
    const auto& table = *options.block_table;
    if (table.ndim() != 2 || table.shape(0) != p.B) refuse("block_table must be (B, max_pages).");
    p.block_table = table.data();
    p.block_table_stride = table.shape(1);
    p.pages = first;
    p.page_size = p.Lk;
    p.Lk = table.shape(1) * p.page_size;
  }
  if (options.cu_seqlens_q.has_value() != options.cu_seqlens_k.has_value()) refuse("cu_seqlens: both or none.");
  if (options.cu_seqlens_q) {
    if (p.B != 1) refuse("packed sequences are arrays (1, H, total, D).");
    p.cu_seqlens_q = options.cu_seqlens_q->data();
    p.cu_seqlens_k = options.cu_seqlens_k->data();
    p.packed_rows = p.Lq;
    p.packed_keys = p.Lk;
    p.Lq = options.max_seqlens[0];
    p.Lk = options.max_seqlens[1];
    p.B = options.cu_seqlens_q->size() - 1;
  }
  p.scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D)));
  p.softcap = options.softcap;
  if (options.w) {
    const bool per_head = options.w->ndim() == 2;
    const View view = float_view(*options.w, "w", per_head ? 2 : 1);
    if (view.dtype != p.dtype) refuse("w does not have q's dtype.");
    if (view.size.back() != p.D || (per_head && view.size[0] != p.Hq)) refuse("w must be (Hq, D) or (D,).");
    if (p.D > 1 && view.stride.back() != 1) refuse("w must be contiguous in its last dimension.");
    // A stride of 0 says that heads share w, and with it dw.
    if (per_head && p.Hq > 1 && view.stride[0] == 0) refuse("w of shape (Hq, D) must have rows of its own.");
    p.w = view.data;
    p.w_stride = per_head ? view.stride[0] : 0;
  }
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

inline py::array make_result(DType dtype, std::vector<py::ssize_t> size) {
  py::array array(numpy_dtype(dtype), std::move(size));
  if (dtype == DType::kBFloat16) {
    array.attr("fill")(0x7fc0);
  } else {
    array.attr("fill")(std::numeric_limits<double>::quiet_NaN());
  }
  return array;
}

inline void copy_strides(const py::array& array, int64_t (&stride)[3]) {
  for (size_t dim = 0; dim < 3; ++dim) {
    stride[dim] = array.strides(static_cast<py::ssize_t>(dim)) / array.itemsize();
  }
}

// Batch entries and rows of q, o and the statistics as arrays.
struct RowSize {
  int64_t B, Lq, Lk;
};
inline RowSize row_size(const AttentionParams& p) {
  if (p.cu_seqlens_q) return {1, p.packed_rows, p.packed_keys};
  return {p.B, p.Lq, p.Lk};
}

// What a forward call returns. run(params) computes it, without Python's lock.
template <class Run>
py::dict forward_arrays(const py::array& q, const py::array& k, const py::array& v, const Options& options, Run run) {
  AttentionParams p = make_params(q, k, v, options);
  const DType stat = accumulator(p.dtype);
  const RowSize size = row_size(p);
  py::array o = make_result(p.dtype, {size.B, p.Hq, size.Lq, p.Dv});
  py::array lse = make_result(stat, {size.B, p.Hq, size.Lq});
  py::array row_max = make_result(stat, {size.B, p.Hq, size.Lq});
  py::array row_sum = make_result(stat, {size.B, p.Hq, size.Lq});
  p.o = o.mutable_data();
  copy_strides(o, p.o_stride);
  p.lse = lse.mutable_data();
  p.row_max = row_max.mutable_data();
  p.row_sum = row_sum.mutable_data();
  {
    py::gil_scoped_release others_may_run;
    run(static_cast<const AttentionParams&>(p));
  }
  py::dict results;
  results["o"] = o;
  results["lse"] = lse;
  results["row_max"] = row_max;
  results["row_sum"] = row_sum;
  return results;
}

// What a backward call returns; `results` is what the forward call returned for the same arguments.
template <class Run>
py::dict backward_arrays(const py::array& d_o, const py::array& q, const py::array& k, const py::array& v,
                         const py::dict& results, const OptionalArray& d_lse, const Options& options, Run run) {
  AttentionGradParams g;
  g.forward = make_params(q, k, v, options);
  AttentionParams& p = g.forward;
  const DType stat = accumulator(p.dtype);
  const RowSize size = row_size(p);
  const auto stats_of = [&](const py::array& array, const char* name) {
    return vector_data(array.attr("reshape")(-1).cast<py::array>(), name, stat, size.B * p.Hq * size.Lq);
  };
  const py::array o = results["o"].cast<py::array>();
  const py::array row_max = results["row_max"].cast<py::array>(), row_sum = results["row_sum"].cast<py::array>();
  p.o = rows_view(o, "o", p.dtype, {size.B, p.Hq, size.Lq, p.Dv}, p.o_stride).data;
  p.row_max = const_cast<void*>(stats_of(row_max, "row_max"));
  p.row_sum = const_cast<void*>(stats_of(row_sum, "row_sum"));
  g.d_o = rows_view(d_o, "d_o", p.dtype, {size.B, p.Hq, size.Lq, p.Dv}, g.d_o_stride).data;
  if (d_lse) g.d_lse = stats_of(*d_lse, "d_lse");

  py::dict gradients;
  const auto add = [&](const char* name, py::array array) {
    gradients[name] = array;
    return array.mutable_data();
  };
  g.dq = add("dq", make_result(p.dtype, {size.B, p.Hq, size.Lq, p.D}));
  g.dk = add("dk", make_result(p.dtype, {size.B, p.Hkv, size.Lk, p.D}));
  g.dv = add("dv", make_result(p.dtype, {size.B, p.Hkv, size.Lk, p.Dv}));
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
  if (options.w) {
    const py::array& w = *options.w;
    g.dw = add("dw", make_result(stat, std::vector<py::ssize_t>(w.shape(), w.shape() + w.ndim())));
  }
  {
    py::gil_scoped_release others_may_run;
    run(static_cast<const AttentionGradParams&>(g));
  }
  return gradients;
}

}  // namespace fastattn::testing
