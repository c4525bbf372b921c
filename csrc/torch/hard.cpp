// Hard attention: from tensors to params, and the gradients of a choice.
#include <torch/csrc/stable/ops.h>

#include "torch/attention.h"
#include "torch/engine.h"
#include "torch/inputs.h"

namespace fastattn {

std::tuple<Tensor, Tensor, Tensor, Tensor> hard_attention_forward(const AttentionArguments& a, bool save_stats) {
  const Device device = device_of(a.q);
  HardAttentionParams hard;
  AttentionParams& p = hard.attention;
  p = check_attention(a, device.is_cuda());
  engine::check_device(device);
  const Inputs inputs = point_at_inputs(a, &p);
  const int32_t accumulator = dtype_code(accumulator_dtype(p.dtype));

  Tensor o = empty_rows_like(a.q, {p.B, p.Hq, p.Lq, p.Dv});
  Tensor index = empty_contiguous(std::array{p.B, p.Hq, p.Lq}, aoti_torch_dtype_int64(), device);
  Tensor log_prob = empty_contiguous(std::array{p.B, p.Hq, p.Lq}, accumulator, device);
  Tensor stats = save_stats ? empty_contiguous(std::array{int64_t{2}, p.B, p.Hq, p.Lq}, accumulator, device)
                            : empty_nothing(accumulator, device);
  if (index.numel() == 0) return {o, index, log_prob, stats};

  p.o = o.mutable_data_ptr();
  row_strides(o, p.o_stride);
  if (save_stats) point_at_stats(stats, &p);
  hard.is_sampled = a.rng_state.has_value();
  hard.index = static_cast<int64_t*>(index.mutable_data_ptr());
  hard.log_prob = log_prob.mutable_data_ptr();
  engine::hard_attention_forward(hard, device);
  return {o, index, log_prob, stats};
}

std::tuple<Tensor, Tensor, Tensor> hard_attention_backward(const HardAttentionGradArguments& a) {
  HardAttentionGradParams g;
  AttentionParams& p = g.forward;
  const Device device = device_of(a.attention.q);
  p = check_hard_attention_grad(a, device.is_cuda());
  engine::check_device(device);
  const Inputs inputs = point_at_inputs(a.attention, &p);

  const Tensor index = as_contiguous(a.index), stats = as_contiguous(a.stats);
  std::optional<Tensor> d_o, d_log_prob;
  if (a.d_o) d_o = with_contiguous_rows(*a.d_o);
  if (a.d_log_prob) d_log_prob = as_contiguous(*a.d_log_prob);
  Tensor dq = empty_rows_like(a.attention.q, shape_of(a.attention.q));
  Tensor dk = empty_rows_like(a.attention.k, shape_of(a.attention.k));
  Tensor dv = empty_rows_like(a.attention.v, shape_of(a.attention.v));
  if (index.numel() == 0) {
    for (Tensor grad : {dq, dk, dv}) torch::stable::zero_(grad);
    return {dq, dk, dv};
  }

  point_at_stats(stats, &p);
  g.index = static_cast<const int64_t*>(index.const_data_ptr());
  if (d_log_prob) g.d_log_prob = d_log_prob->const_data_ptr();
  if (d_o) {
    g.d_o = d_o->const_data_ptr();
    row_strides(*d_o, g.d_o_stride);
  }
  g.dq = dq.mutable_data_ptr();
  g.dk = dk.mutable_data_ptr();
  g.dv = dv.mutable_data_ptr();
  row_strides(dq, g.dq_stride);
  row_strides(dk, g.dk_stride);
  row_strides(dv, g.dv_stride);
  engine::hard_attention_backward(g, device);
  return {dq, dk, dv};
}

}  // namespace fastattn
