// _fastattn_core, the CUDA engine's append to a cache on the emulator: in place, on NumPy arrays.
#include <optional>
#include <string>

#include "core/cache.h"
#include "testing/emulation.h"
#include "testing/module.h"

namespace fastattn::testing {
namespace {

using Lengths = py::array_t<int32_t, py::array::c_style>;

// k (B, Hkv, Lnew, D) and v go to k_cache (B, Hkv, rows, D) or (pages, Hkv, page_size, D) and v_cache. Returns the new
// lengths and, with cos, q rotated.
py::dict append_to_cache(const py::array& k, const py::array& v, py::array& k_cache, py::array& v_cache,
                         const Lengths& cache_lengths, std::optional<Lengths> block_table, OptionalArray k_scale,
                         OptionalArray v_scale, OptionalArray cos, OptionalArray sin, bool interleaved, OptionalArray q,
                         const py::dict& settings) {
  const Emulation emulation = Emulation::from(settings);
  CacheAppendParams p;
  const View k_view = float_view(k, "k", 4), cache = shape_view(k_cache, "k_cache", 4);
  p.dtype = k_view.dtype;
  p.B = k_view.size[0], p.Hkv = k_view.size[1], p.Lnew = k_view.size[2], p.D = k_view.size[3];
  p.Dv = float_view(v, "v", 4).size[3];
  p.k = rows_view(k, "k", p.dtype, {p.B, p.Hkv, p.Lnew, p.D}, p.k_stride).data;
  p.v = rows_view(v, "v", p.dtype, {p.B, p.Hkv, p.Lnew, p.Dv}, p.v_stride).data;
  const int64_t first = cache.size[0], rows = cache.size[2];
  p.k_cache = cache_data(k_cache, "k_cache", p.dtype, k_scale, first, p.Hkv, rows, p.D, p.k_cache_stride);
  p.v_cache = cache_data(v_cache, "v_cache", p.dtype, v_scale, first, p.Hkv, rows, p.Dv, p.v_cache_stride);
  if (k_scale) {
    p.k_scale = scale_data(*k_scale, "k_scale", first, p.Hkv, rows, p.k_scale_stride);
    p.v_scale = scale_data(v_scale.value(), "v_scale", first, p.Hkv, rows, p.v_scale_stride);
  }
  p.cache_lengths = cache_lengths.data();
  Lengths new_lengths(p.B);
  p.new_lengths = new_lengths.mutable_data();
  p.max_keys = rows;
  if (block_table) {
    p.block_table = block_table->data();
    p.block_table_stride = block_table->shape(1);
    p.page_size = rows;
    p.pages = first;
    p.max_keys = block_table->shape(1) * rows;
  }
  py::dict results;
  results["new_lengths"] = new_lengths;
  if (cos) {
    const View angles = float_view(*cos, "cos", 2), sines = float_view(sin.value(), "sin", 2);
    p.cos = angles.data, p.sin = sines.data;
    p.rotary_dtype = angles.dtype;
    p.cos_stride = angles.stride[0], p.sin_stride = sines.stride[0];
    p.positions = angles.size[0], p.rotary_dim = 2 * angles.size[1];
    p.rotary_interleaved = interleaved;
    const View q_view = float_view(q.value(), "q", 4);
    p.Hq = q_view.size[1], p.Lq = q_view.size[2];
    p.q = rows_view(*q, "q", p.dtype, {p.B, p.Hq, p.Lq, p.D}, p.q_stride).data;
    py::array rotated = make_result(p.dtype, {p.B, p.Hq, p.Lq, p.D});
    p.rotated_q = rotated.mutable_data();
    copy_strides(rotated, p.rotated_q_stride);
    results["rotated_q"] = rotated;
  }
  Run run;
  {
    py::gil_scoped_release others_may_run;
    run = emulator::append_to_cache(p, emulation.options, emulation.os_threads);
  }
  results["run"] = as_dict(run);
  return results;
}

}  // namespace

void bind_cuda_cache(py::module_& m) {
  m.def("emulated_append_to_cache", &append_to_cache, py::arg("k"), py::arg("v"), py::arg("k_cache"),
        py::arg("v_cache"), py::arg("cache_lengths"), py::kw_only(), py::arg("block_table") = py::none(),
        py::arg("k_scale") = py::none(), py::arg("v_scale") = py::none(), py::arg("cos") = py::none(),
        py::arg("sin") = py::none(), py::arg("interleaved") = false, py::arg("q") = py::none(),
        py::arg("emulator") = py::dict());
}

}  // namespace fastattn::testing
