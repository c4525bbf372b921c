// Launches on the current stream of the tensors' device, with that device current, and waits for nothing: safe with
// several GPUs and under capture of a CUDA graph.
#define USE_CUDA  // the shims that only CUDA builds of torch export; no header of CUDA comes with it
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "cuda/attention.h"
#include "torch/engine.h"
#include "torch/errors.h"

namespace fastattn::engine {
namespace {

cuda::Stream current_stream(const Device& device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  return stream;
}

// Scratch memory for work on the current stream. As a tensor it may be let go as soon as that work has been launched:
// torch's allocator gives it to nothing but later work on the same stream, and a captured graph has it to itself.
class Workspace {
 public:
  Workspace(size_t bytes, const Device& device) {
    if (bytes == 0) return;
    tensor_ = empty_contiguous(std::array{static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), device);
    data_ = tensor_->mutable_data_ptr();
  }
  void* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

// What the CUDA engine throws is nobody's argument: it gets the mark by which Python tells a RuntimeError.
template <typename Call>
auto reported(const Call& call) {
  try {
    return call();
  } catch (const std::runtime_error& error) {
    runtime_error(error.what());
  }
}

cuda::DeviceProperties properties_of(const Device& device) {
  return reported([&] { return cuda::device_properties(device.index); });
}

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// Launches kernels with the scratch memory that they ask for.
template <typename Params>
void launch(size_t (*workspace_bytes)(const Params&, const cuda::DeviceProperties&),
            void (*kernels)(const Params&, const cuda::DeviceProperties&, void* workspace, cuda::Stream),
            const Params& params, const Device& device) {
  const DeviceGuard guard(device.index);
  const cuda::DeviceProperties properties = properties_of(device);
  const Workspace workspace(workspace_bytes(params, properties), device);
  reported([&] { kernels(params, properties, workspace.data(), current_stream(device)); });
}

}  // namespace

void check_device(const Device& device) {
  const int capability = properties_of(device).compute_capability;
  if (capability < cuda::kMinComputeCapability) {
    value_error("q is on ", device_name(device), ", whose compute capability is ", capability / 10, ".",
                capability % 10,
                "; the CUDA kernels need 8.0 (Ampere) or later: use a newer GPU, move the tensors to "
                "the CPU with q.cpu(), or call torch.nn.functional.scaled_dot_product_attention.");
  }
}

void set_rng_state(const int64_t* state, AttentionParams* params) { params->rng_state = state; }

void attention_forward(const AttentionParams& params, const Device& device) {
  launch(cuda::forward_workspace_bytes, cuda::attention_forward, params, device);
}

void attention_backward(const AttentionGradParams& params, const Device& device) {
  launch(cuda::backward_workspace_bytes, cuda::attention_backward, params, device);
}

void hard_attention_forward(const HardAttentionParams& params, const Device& device) {
  launch(cuda::hard_forward_workspace_bytes, cuda::hard_attention_forward, params, device);
}

void hard_attention_backward(const HardAttentionGradParams& params, const Device& device) {
  launch(cuda::hard_backward_workspace_bytes, cuda::hard_attention_backward, params, device);
}

void attention_summary(const SummaryParams& params, const Device& device) {
  launch(cuda::summary_workspace_bytes, cuda::attention_summary, params, device);
}

void append_to_cache(const CacheAppendParams& params, const Device& device) {
  const DeviceGuard guard(device.index);
  reported([&] { cuda::append_to_cache(params, current_stream(device)); });
}

void dropout_mask(uint8_t* keep, const int64_t* state, const MaskSizes& sizes, double p, const Device& device) {
  const DeviceGuard guard(device.index);
  reported([&] { cuda::dropout_mask(keep, state, sizes.B, sizes.H, sizes.Lq, sizes.Lk, p, current_stream(device)); });
}

}  // namespace fastattn::engine
