// From tensors to params: copies rows that are not contiguous, allocates results, calls the engine.
#include "torch/attention.h"

#include <torch/csrc/stable/ops.h>

#include "torch/engine.h"
#include "torch/inputs.h"
#include "torch/tensors.h"

namespace fastattn {

std::tuple<Tensor, Tensor, Tensor> attention_forward(const AttentionArguments& a, bool save_stats) {
  const Device device = device_of(a.q);
  AttentionParams p = check_attention(a, device.is_cuda());
  engine::check_device(device);
  const Inputs inputs = point_at_inputs(a, &p);
  const int32_t accumulator = dtype_code(accumulator_dtype(p.dtype));

  Tensor o = empty_rows_like(a.q, row_shape(a, p));
  const Shape lse_shape = statistic_shape(a, p), both_shape = stats_shape(a, p);
  Tensor lse = empty_contiguous(lse_shape.size, lse_shape.dim, accumulator, device);
  Tensor stats = save_stats ? empty_contiguous(both_shape.size, both_shape.dim, accumulator, device)
                            : empty_nothing(accumulator, device);
  if (lse.numel() == 0) return {o, lse, stats};

  p.o = o.mutable_data_ptr();
  row_strides(o, p.o_stride);
  p.lse = lse.mutable_data_ptr();
  if (save_stats) point_at_stats(stats, &p);
  engine::attention_forward(p, device);
  return {o, lse, stats};
}

AttentionGradients attention_backward(const AttentionGradArguments& a) {
  AttentionGradParams g;
  AttentionParams& p = g.forward;
  const Device device = device_of(a.forward.q);
  p = check_attention_grad(a, device.is_cuda());
  engine::check_device(device);
  const Inputs inputs = point_at_inputs(a.forward, &p);
  const int32_t accumulator = dtype_code(accumulator_dtype(p.dtype));

  const Tensor o = with_contiguous_rows(a.o), d_o = with_contiguous_rows(a.d_o), stats = as_contiguous(a.stats);
  std::optional<Tensor> d_lse;
  if (a.d_lse) d_lse = as_contiguous(*a.d_lse);

  Tensor dq = empty_rows_like(a.forward.q, shape_of(a.forward.q));
  Tensor dk = empty_rows_like(a.forward.k, shape_of(a.forward.k));
  Tensor dv = empty_rows_like(a.forward.v, shape_of(a.forward.v));
  Tensor d_bias = empty_nothing(accumulator, device), d_sinks = empty_nothing(accumulator, device);
  if (a.need_d_bias) {
    const Tensor& bias = *a.forward.bias;
    d_bias = empty_contiguous(bias.sizes().data(), bias.dim(), accumulator, device);
  }
  if (a.need_d_sinks) d_sinks = empty_contiguous(std::array{p.Hq}, accumulator, device);
  Tensor dw = empty_nothing(accumulator, device);
  if (a.forward.w) dw = empty_contiguous(a.forward.w->sizes().data(), a.forward.w->dim(), accumulator, device);

  if (a.d_o.numel() == 0 || p.B == 0) {  // no row, and with Hq = 0 no group size either
    for (Tensor grad : {dq, dk, dv, d_bias, d_sinks, dw}) torch::stable::zero_(grad);
  } else {
    // The engine's o is an input here; the params hold one pointer for both passes.
    p.o = const_cast<void*>(o.const_data_ptr());
    row_strides(o, p.o_stride);
    point_at_stats(stats, &p);
    g.d_o = d_o.const_data_ptr();
    row_strides(d_o, g.d_o_stride);
    if (d_lse) g.d_lse = d_lse->const_data_ptr();
    g.dq = dq.mutable_data_ptr();
    g.dk = dk.mutable_data_ptr();
    g.dv = dv.mutable_data_ptr();
    row_strides(dq, g.dq_stride);
    row_strides(dk, g.dk_stride);
    row_strides(dv, g.dv_stride);
    if (a.need_d_bias) {
      g.d_bias = d_bias.mutable_data_ptr();
      broadcast_strides(d_bias, g.d_bias_stride, 4);
    }
    if (a.need_d_sinks) g.d_sinks = d_sinks.mutable_data_ptr();
    if (a.forward.w) g.dw = dw.mutable_data_ptr();
    engine::attention_backward(g, device);
  }
  if (a.need_d_bias && dtype_code(*a.forward.bias) != accumulator) {
    d_bias = torch::stable::to(d_bias, a.forward.bias->scalar_type());
  }
  if (a.forward.w && dtype_code(*a.forward.w) != accumulator) {
    dw = torch::stable::to(dw, a.forward.w->scalar_type());
  }
  return {dq, dk, dv, d_bias, d_sinks, dw};
}

Tensor dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p) {
  check_dropout_mask(rng_state, B, H, Lq, Lk, p);
  const Device device = device_of(rng_state);
  engine::check_device(device);
  Tensor result = empty_contiguous(std::array{B, H, Lq, Lk}, aoti_torch_dtype_bool(), device);
  if (result.numel() == 0) return result;
  const Tensor state = as_contiguous(rng_state);
  engine::dropout_mask(static_cast<uint8_t*>(result.mutable_data_ptr()),
                       static_cast<const int64_t*>(state.const_data_ptr()), {B, H, Lq, Lk}, p, device);
  return result;
}

}  // namespace fastattn
