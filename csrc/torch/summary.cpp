// The summary of the attention weights: from tensors to params.
#include <torch/csrc/stable/ops.h>

#include "torch/attention.h"
#include "torch/engine.h"
#include "torch/inputs.h"

namespace fastattn {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_summary(const SummaryArguments& a) {
  const AttentionArguments& attention = a.attention;
  const Device device = device_of(attention.q);
  SummaryParams summary;
  AttentionParams& p = summary.attention;
  p = check_summary(a, device.is_cuda());
  engine::check_device(device);
  const Inputs inputs = point_at_inputs(attention, &p);
  p.v = nullptr;
  const int32_t accumulator = dtype_code(accumulator_dtype(p.dtype));

  const std::array rows{p.B, p.Hq, p.Lq};
  const std::array top{p.B, p.Hq, p.Lq, a.top_k};
  Tensor entropy = empty_contiguous(rows, accumulator, device);
  Tensor max_weight = empty_contiguous(rows, accumulator, device);
  Tensor lse = empty_contiguous(rows, accumulator, device);
  Tensor top_weights = empty_contiguous(top, accumulator, device);
  Tensor top_index = empty_contiguous(top, aoti_torch_dtype_int64(), device);
  Tensor key_mass = a.need_mass ? empty_contiguous(std::array{p.B, p.Hq, p.Lk}, accumulator, device)
                                : empty_nothing(accumulator, device);
  if (lse.numel() == 0) {
    torch::stable::zero_(key_mass);
    return {entropy, max_weight, top_weights, top_index, key_mass, lse};
  }

  summary.entropy = entropy.mutable_data_ptr();
  summary.max_weight = max_weight.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  summary.top_k = a.top_k;
  if (a.top_k > 0) {
    summary.top_weights = top_weights.mutable_data_ptr();
    summary.top_index = static_cast<int64_t*>(top_index.mutable_data_ptr());
  }
  if (a.need_mass) summary.key_mass = key_mass.mutable_data_ptr();
  if (a.row_mask) {
    summary.row_mask = static_cast<const uint8_t*>(a.row_mask->const_data_ptr());
    broadcast_strides(*a.row_mask, summary.row_mask_stride, 3);
  }
  engine::attention_summary(summary, device);
  return {entropy, max_weight, top_weights, top_index, key_mass, lse};
}

}  // namespace fastattn
