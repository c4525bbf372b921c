#include "torch/tensors.h"

#include <sstream>

#include "torch/errors.h"

namespace fastattn {

int32_t dtype_code(DType dtype) {
  // Asked for once: each answer is a call into libtorch.
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                                  aoti_torch_dtype_float64()};
  return codes[static_cast<int>(dtype)];
}

DType accumulator_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

bool to_dtype(int32_t code, DType* dtype) {
  for (const DType known : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
    if (code == dtype_code(known)) {
      *dtype = known;
      return true;
    }
  }
  return false;
}

std::string dtype_name(int32_t code) {
  const struct {
    int32_t code;
    const char* name;
  } known[] = {
      {aoti_torch_dtype_float32(), "torch.float32"},
      {aoti_torch_dtype_bfloat16(), "torch.bfloat16"},
      {aoti_torch_dtype_float16(), "torch.float16"},
      {aoti_torch_dtype_float64(), "torch.float64"},
      {aoti_torch_dtype_bool(), "torch.bool"},
      {aoti_torch_dtype_uint8(), "torch.uint8"},
      {aoti_torch_dtype_int8(), "torch.int8"},
      {aoti_torch_dtype_int16(), "torch.int16"},
      {aoti_torch_dtype_int32(), "torch.int32"},
      {aoti_torch_dtype_int64(), "torch.int64"},
      {aoti_torch_dtype_complex32(), "torch.complex32"},
      {aoti_torch_dtype_complex64(), "torch.complex64"},
      {aoti_torch_dtype_complex128(), "torch.complex128"},
      {aoti_torch_dtype_float8_e5m2(), "torch.float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "torch.float8_e4m3fn"},
  };
  for (const auto& entry : known) {
    if (entry.code == code) return entry.name;
  }
  return "of another dtype";
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  const IntHeaderOnlyArrayRef sizes = tensor.sizes();
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

Device device_of(const Tensor& tensor) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  if (device.type == aoti_torch_device_type_cpu()) return device;  // torch has -1 or 0 for its index
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

std::string device_name(const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index);
  return "a device of another kind";
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype, const Device& device) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle) != AOTI_TORCH_SUCCESS) {
    std::ostringstream shape;
    for (int64_t i = 0; i < dim; ++i) shape << (i ? ", " : "") << sizes[i];
    if (device.is_cuda()) {
      out_of_memory_error("CUDA out of memory: a ", dtype_name(dtype), " tensor of shape (", shape.str(),
                          ") could not be allocated on ", device_name(device),
                          ". Where there is memory enough, an earlier kernel has failed: run again with "
                          "CUDA_LAUNCH_BLOCKING=1.");
    }
    runtime_error("there is not enough memory for a ", dtype_name(dtype), " tensor of shape (", shape.str(), ").");
  }
  return Tensor(handle);
}

Tensor empty_contiguous(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device) {
  int64_t strides[8];
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, dim, dtype, device);
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  // The stride of a dimension of size 1 is never used, and torch leaves anything there.
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : as_contiguous(tensor);
}

Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  // Allocated here rather than by torch::stable::contiguous, whose report of a failure names no tensor.
  const IntHeaderOnlyArrayRef sizes = tensor.sizes();
  Tensor copy = empty_contiguous(sizes.data(), tensor.dim(), dtype_code(tensor), device_of(tensor));
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace fastattn
