#include "torch/inputs.h"

#include <algorithm>

#include "torch/engine.h"

namespace fastattn {

void row_strides(const Tensor& tensor, int64_t stride[3]) {
  if (tensor.dim() == 3) {
    stride[0] = 0, stride[1] = tensor.stride(1), stride[2] = tensor.stride(0);
    return;
  }
  const IntHeaderOnlyArrayRef strides = tensor.strides();
  for (int i = 0; i < 3; ++i) stride[i] = strides[static_cast<size_t>(i)];
}

void broadcast_strides(const Tensor& tensor, int64_t* stride, size_t dims) {
  const IntHeaderOnlyArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  const size_t missing = dims - sizes.size();
  for (size_t i = 0; i < dims; ++i) stride[i] = i < missing || sizes[i - missing] == 1 ? 0 : strides[i - missing];
}

Inputs point_at_inputs(const AttentionArguments& a, AttentionParams* p) {
  const Tensor k = with_contiguous_rows(a.k);
  // Where k stands in for v, one copy of it will do.
  Inputs inputs{with_contiguous_rows(a.q), k, &a.v == &a.k ? k : with_contiguous_rows(a.v), {}, {}, {}, {}, {}, {}};
  p->q = inputs.q.const_data_ptr();
  p->k = inputs.k.const_data_ptr();
  p->v = inputs.v.const_data_ptr();
  row_strides(inputs.q, p->q_stride);
  row_strides(inputs.k, p->k_stride);
  row_strides(inputs.v, p->v_stride);
  if (a.bias) {
    p->bias = a.bias->const_data_ptr();
    broadcast_strides(*a.bias, p->bias_stride, 4);
  }
  if (a.mask) {
    p->mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
    broadcast_strides(*a.mask, p->mask_stride, 4);
  }
  if (a.alibi_slopes) {
    const bool per_batch = a.alibi_slopes->dim() == 2;
    p->alibi_slopes = a.alibi_slopes->const_data_ptr();
    p->alibi_stride[0] = per_batch ? a.alibi_slopes->stride(0) : 0;
    p->alibi_stride[1] = a.alibi_slopes->stride(per_batch ? 1 : 0);
  }
  if (a.sinks) {
    inputs.sinks = as_contiguous(*a.sinks);
    p->sinks = inputs.sinks->const_data_ptr();
  }
  if (a.kv_lengths) {
    inputs.kv_lengths = as_contiguous(*a.kv_lengths);
    p->kv_lengths = static_cast<const int32_t*>(inputs.kv_lengths->const_data_ptr());
  }
  if (a.packed) {
    inputs.cu_seqlens_q = as_contiguous(a.packed->cu_seqlens_q);
    inputs.cu_seqlens_k = as_contiguous(a.packed->cu_seqlens_k);
    p->cu_seqlens_q = static_cast<const int32_t*>(inputs.cu_seqlens_q->const_data_ptr());
    p->cu_seqlens_k = static_cast<const int32_t*>(inputs.cu_seqlens_k->const_data_ptr());
  }
  if (a.w) {
    // A w that was expanded over the heads is one for each of them, with a gradient for each: not what a stride of 0
    // says.
    inputs.w = as_contiguous(*a.w);
    p->w = inputs.w->const_data_ptr();
    p->w_stride = inputs.w->dim() == 2 ? p->D : 0;
  }
  if (a.rng_state) {
    inputs.rng_state = as_contiguous(*a.rng_state);
    engine::set_rng_state(static_cast<const int64_t*>(inputs.rng_state->const_data_ptr()), p);
  }
  return inputs;
}

void point_at_stats(const Tensor& stats, AttentionParams* p) {
  p->row_max = const_cast<void*>(stats.const_data_ptr());
  p->row_sum = static_cast<char*>(p->row_max) + stats.numel() / 2 * static_cast<int64_t>(stats.element_size());
}

Shape shape_of(const Tensor& tensor) {
  Shape shape{};
  for (const int64_t n : tensor.sizes()) shape.size[shape.dim++] = n;
  return shape;
}

Tensor empty_rows_like(const Tensor& like, const Shape& shape) {
  const Device device = device_of(like);
  const bool is_packed = shape.dim == 3;
  const bool is_contiguous = is_packed ? like.stride(1) <= like.stride(0) : like.stride(1) >= like.stride(2);
  if (is_contiguous) return empty_contiguous(shape.size, shape.dim, dtype_code(like), device);
  // As torch counts strides: a size of 0 counts as 1.
  int64_t size[4];
  for (int i = 0; i < 4; ++i) size[i] = std::max<int64_t>(shape.size[i], 1);
  if (is_packed) {
    const int64_t strides[3] = {size[2], size[0] * size[2], 1};
    return empty_strided(shape.size, strides, 3, dtype_code(like), device);
  }
  const int64_t row = size[1] * size[3];
  const int64_t strides[4] = {size[2] * row, size[3], row, 1};
  return empty_strided(shape.size, strides, 4, dtype_code(like), device);
}

Tensor empty_nothing(int32_t dtype, const Device& device) {
  return empty_contiguous(std::array{int64_t{0}}, dtype, device);
}

}  // namespace fastattn
