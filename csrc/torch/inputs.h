// What all operators do with their tensors: point params at them, allocate results that lie in memory as they do.
#pragma once

#include <optional>

#include "torch/arguments.h"
#include "torch/tensors.h"

namespace fastattn {

// Tensors that the params point into.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> sinks, kv_lengths, rng_state, w, cu_seqlens_q, cu_seqlens_k;
};

Inputs point_at_inputs(const AttentionArguments& arguments, AttentionParams* params);

// Row statistics, row_max and then row_sum: contiguous, [2, B, Hq, Lq]. The params hold one pointer for the forward
// pass, which writes them, and the backward pass, which reads them.
void point_at_stats(const Tensor& stats, AttentionParams* params);

// Strides along batch, head and row of a tensor (B, H, L, D); of a packed one, (total, H, D), the first is 0.
void row_strides(const Tensor& tensor, int64_t stride[3]);

// Strides of a tensor of up to `dims` dimensions, the last ones aligned: 0 along one that is broadcast, for it is
// missing or its size is 1.
void broadcast_strides(const Tensor& tensor, int64_t* stride, size_t dims);

Shape shape_of(const Tensor& tensor);

// A result that lies in memory as `like` does. (B, H, L, D): as (B, L, H, D) when like's heads lie inside its rows, as
// they do when a projection of shape (B, L, H * D) was split, else contiguous. Packed, (total, H, D): as (H, total, D)
// when like's rows lie inside its heads, else contiguous. The fakes in fastattn/ say the same.
Tensor empty_rows_like(const Tensor& like, const Shape& shape);

Tensor empty_nothing(int32_t dtype, const Device& device);  // shape (0,)

}  // namespace fastattn
