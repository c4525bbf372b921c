// From tensors to params: copies rows that are not contiguous, allocates results, calls the engine.
#include "torch/attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "torch/engine.h"
#include "torch/tensors.h"

namespace fastattn {
namespace {

// Tensors that the params point into.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> sinks, kv_lengths, rng_state;
};

void row_strides(const Tensor& tensor, int64_t stride[3]) {
  const IntHeaderOnlyArrayRef strides = tensor.strides();
  for (int i = 0; i < 3; ++i) stride[i] = strides[static_cast<size_t>(i)];
}

// Strides along batch, head, query and key of a tensor of up to four dimensions: 0 along one that is broadcast, for it
// is missing or its size is 1.
void broadcast_strides(const Tensor& tensor, int64_t stride[4]) {
  const IntHeaderOnlyArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  const size_t missing = 4 - sizes.size();
  for (size_t i = 0; i < 4; ++i) stride[i] = i < missing || sizes[i - missing] == 1 ? 0 : strides[i - missing];
}

Inputs point_at_inputs(const AttentionArguments& a, AttentionParams* p) {
  Inputs inputs{with_contiguous_rows(a.q), with_contiguous_rows(a.k), with_contiguous_rows(a.v), {}, {}, {}};
  p->q = inputs.q.const_data_ptr();
  p->k = inputs.k.const_data_ptr();
  p->v = inputs.v.const_data_ptr();
  row_strides(inputs.q, p->q_stride);
  row_strides(inputs.k, p->k_stride);
  row_strides(inputs.v, p->v_stride);
  if (a.bias) {
    p->bias = a.bias->const_data_ptr();
    broadcast_strides(*a.bias, p->bias_stride);
  }
  if (a.mask) {
    p->mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
    broadcast_strides(*a.mask, p->mask_stride);
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
  if (a.rng_state) {
    inputs.rng_state = as_contiguous(*a.rng_state);
    engine::set_rng_state(static_cast<const int64_t*>(inputs.rng_state->const_data_ptr()), p);
  }
  return inputs;
}

// A result of shape [B, H, L, D] that lies in memory as `like` does: (B, L, H, D) when like's heads lie inside its
// rows, as they do when a projection of shape (B, L, H * D) was split, else (B, H, L, D). The fakes in _ops.py say the
// same.
Tensor empty_rows_like(const Tensor& like, int64_t B, int64_t H, int64_t L, int64_t D) {
  const int64_t sizes[4] = {B, H, L, D};
  const Device device = device_of(like);
  if (like.stride(1) >= like.stride(2)) return empty_contiguous(sizes, 4, dtype_code(like), device);
  // As torch counts strides: a size of 0 counts as 1.
  const int64_t row = std::max<int64_t>(H, 1) * std::max<int64_t>(D, 1);
  const int64_t strides[4] = {std::max<int64_t>(L, 1) * row, std::max<int64_t>(D, 1), row, 1};
  return empty_strided(sizes, strides, 4, dtype_code(like), device);
}

Tensor empty_nothing(int32_t dtype, const Device& device) {
  return empty_contiguous(std::array{int64_t{0}}, dtype, device);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_forward(const AttentionArguments& a, bool save_stats) {
  const Device device = device_of(a.q);
  AttentionParams p = check_attention(a, device.is_cuda());
  engine::check_device(device);
  const Inputs inputs = point_at_inputs(a, &p);
  const int32_t accumulator = dtype_code(accumulator_dtype(p.dtype));

  Tensor o = empty_rows_like(a.q, p.B, p.Hq, p.Lq, p.Dv);
  Tensor lse = empty_contiguous(std::array{p.B, p.Hq, p.Lq}, accumulator, device);
  Tensor stats = save_stats ? empty_contiguous(std::array{int64_t{2}, p.B, p.Hq, p.Lq}, accumulator, device)
                            : empty_nothing(accumulator, device);
  if (lse.numel() == 0) return {o, lse, stats};

  p.o = o.mutable_data_ptr();
  row_strides(o, p.o_stride);
  p.lse = lse.mutable_data_ptr();
  if (save_stats) {
    p.row_max = stats.mutable_data_ptr();
    p.row_sum = static_cast<char*>(p.row_max) + lse.numel() * static_cast<int64_t>(lse.element_size());
  }
  engine::attention_forward(p, device);
  return {o, lse, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const AttentionGradArguments& a) {
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

  Tensor dq = empty_rows_like(a.forward.q, p.B, p.Hq, p.Lq, p.D);
  Tensor dk = empty_rows_like(a.forward.k, p.B, p.Hkv, p.Lk, p.D);
  Tensor dv = empty_rows_like(a.forward.v, p.B, p.Hkv, p.Lk, p.Dv);
  Tensor d_bias = empty_nothing(accumulator, device), d_sinks = empty_nothing(accumulator, device);
  if (a.need_d_bias) {
    const Tensor& bias = *a.forward.bias;
    d_bias = empty_contiguous(bias.sizes().data(), bias.dim(), accumulator, device);
  }
  if (a.need_d_sinks) d_sinks = empty_contiguous(std::array{p.Hq}, accumulator, device);

  if (p.B == 0 || p.Hq == 0 || p.Lq == 0) {  // no row, and with Hq = 0 no group size either
    for (Tensor grad : {dq, dk, dv, d_bias, d_sinks}) torch::stable::zero_(grad);
  } else {
    // The engine's o is an input here; the params hold one pointer for both passes.
    p.o = const_cast<void*>(o.const_data_ptr());
    row_strides(o, p.o_stride);
    p.row_max = const_cast<void*>(stats.const_data_ptr());
    p.row_sum = static_cast<char*>(p.row_max) + stats.numel() / 2 * static_cast<int64_t>(stats.element_size());
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
      broadcast_strides(d_bias, g.d_bias_stride);
    }
    if (a.need_d_sinks) g.d_sinks = d_sinks.mutable_data_ptr();
    engine::attention_backward(g, device);
  }
  if (a.need_d_bias && dtype_code(*a.forward.bias) != accumulator) {
    d_bias = torch::stable::to(d_bias, a.forward.bias->scalar_type());
  }
  return {dq, dk, dv, d_bias, d_sinks};
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
