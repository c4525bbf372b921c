// Attention with a cache: appends to it in place, then attends over all of it. From tensors to params.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "torch/attention.h"
#include "torch/engine.h"
#include "torch/inputs.h"
#include "torch/tensors.h"

namespace fastattn {
namespace {

// Tensors that the params point into.
struct CacheInputs {
  std::optional<Tensor> k, v, cos, sin, block_table;
  Tensor cache_lengths;
};

CacheInputs point_at_cache(const KvCacheArguments& a, KvCacheParams* params) {
  AttentionParams& p = params->attention;
  CacheAppendParams& append = params->append;
  CacheInputs inputs{{}, {}, {}, {}, {}, as_contiguous(a.cache_lengths)};
  append.cache_lengths = static_cast<const int32_t*>(inputs.cache_lengths.const_data_ptr());
  if (a.block_table) {
    inputs.block_table = with_contiguous_rows(*a.block_table);
    p.block_table = append.block_table = static_cast<const int32_t*>(inputs.block_table->const_data_ptr());
    p.block_table_stride = append.block_table_stride = inputs.block_table->stride(0);
  }
  append.k_cache = a.attention.k.mutable_data_ptr();
  append.v_cache = a.attention.v.mutable_data_ptr();
  row_strides(a.attention.k, append.k_cache_stride);
  row_strides(a.attention.v, append.v_cache_stride);
  if (a.k_scale) {
    p.k_scale = append.k_scale = static_cast<float*>(a.k_scale->mutable_data_ptr());
    p.v_scale = append.v_scale = static_cast<float*>(a.v_scale->mutable_data_ptr());
    for (int i = 0; i < 3; ++i) {
      p.k_scale_stride[i] = append.k_scale_stride[i] = a.k_scale->stride(i);
      p.v_scale_stride[i] = append.v_scale_stride[i] = a.v_scale->stride(i);
    }
  }
  if (a.k) {
    inputs.k = with_contiguous_rows(*a.k);
    inputs.v = with_contiguous_rows(*a.v);
    append.k = inputs.k->const_data_ptr();
    append.v = inputs.v->const_data_ptr();
    row_strides(*inputs.k, append.k_stride);
    row_strides(*inputs.v, append.v_stride);
  }
  if (a.rotary_cos) {
    inputs.cos = with_contiguous_rows(*a.rotary_cos);
    inputs.sin = with_contiguous_rows(*a.rotary_sin);
    append.cos = inputs.cos->const_data_ptr();
    append.sin = inputs.sin->const_data_ptr();
    append.cos_stride = inputs.cos->stride(0);
    append.sin_stride = inputs.sin->stride(0);
  }
  return inputs;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_with_kv_cache(const KvCacheArguments& a) {
  const Tensor& q = a.attention.q;
  const Device device = device_of(q);
  KvCacheParams params = check_kv_cache(a, device.is_cuda());
  engine::check_device(device);
  check_kv_cache_contents(a, params);
  AttentionParams& p = params.attention;
  CacheAppendParams& append = params.append;
  const Inputs inputs = point_at_inputs(a.attention, &p);
  const CacheInputs cache_inputs = point_at_cache(a, &params);

  // Everything that there may be no memory for comes before the first byte that is written.
  Tensor o = empty_rows_like(q, {p.B, p.Hq, p.Lq, p.Dv});
  Tensor lse = empty_contiguous(std::array{p.B, p.Hq, p.Lq}, dtype_code(accumulator_dtype(p.dtype)), device);
  p.kv_lengths = append.cache_lengths;
  std::optional<Tensor> new_lengths, rotated_q;
  if (append.B * append.Lnew > 0) {
    new_lengths = empty_contiguous(std::array{p.B}, aoti_torch_dtype_int32(), device);
    append.new_lengths = static_cast<int32_t*>(new_lengths->mutable_data_ptr());
    p.kv_lengths = append.new_lengths;
    if (append.rotary_dim != 0) {
      rotated_q = empty_contiguous(std::array{p.B, p.Hq, p.Lq, p.D}, dtype_code(p.dtype), device);
      append.q = p.q;
      std::copy(p.q_stride, p.q_stride + 3, append.q_stride);
      append.rotated_q = rotated_q->mutable_data_ptr();
      row_strides(*rotated_q, append.rotated_q_stride);
      p.q = append.rotated_q;
      row_strides(*rotated_q, p.q_stride);
    }
    engine::append_to_cache(append, device);
  }
  if (lse.numel() == 0) return {o, lse};

  p.o = o.mutable_data_ptr();
  row_strides(o, p.o_stride);
  p.lse = lse.mutable_data_ptr();
  engine::attention_forward(p, device);
  return {o, lse};
}

}  // namespace fastattn
