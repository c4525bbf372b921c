// Small helpers over torch::stable::Tensor: dtypes, devices, shapes as text, allocation.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <string>

#include "core/params.h"

namespace fastattn {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

// torch's code of a dtype: an integer that only libtorch's own functions know how to name.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

int32_t dtype_code(DType dtype);
DType accumulator_dtype(DType dtype);          // float32, or float64 for float64
bool to_dtype(int32_t code, DType* dtype);     // false: not one that the kernels know
std::string dtype_name(int32_t code);          // "torch.float32"
std::string shape_text(const Tensor& tensor);  // "(2, 8, 128, 64)"

inline bool has_dtype(const Tensor& tensor, DType dtype) { return dtype_code(tensor) == dtype_code(dtype); }

// Where a tensor lies, in torch's codes.
struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device&) const = default;
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
};

Device device_of(const Tensor& tensor);
std::string device_name(const Device& device);  // "cpu", "cuda:1"

// All of these allocate through torch: on a GPU from its caching allocator, in the order of the current stream.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype, const Device& device);
Tensor empty_contiguous(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device);

template <size_t dim>
Tensor empty_contiguous(const std::array<int64_t, dim>& sizes, int32_t dtype, const Device& device) {
  return empty_contiguous(sizes.data(), static_cast<int64_t>(dim), dtype, device);
}

// The tensor itself when each of its rows is contiguous, else a copy.
Tensor with_contiguous_rows(const Tensor& tensor);
Tensor as_contiguous(const Tensor& tensor);

}  // namespace fastattn
