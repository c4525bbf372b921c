#include "torch/tools.h"

#include <torch/headeronly/version.h>

#include <algorithm>
#include <limits>

#include "core/philox.h"
#include "cpu/attention.h"
#include "torch/arguments.h"
#include "torch/errors.h"
#include "torch/parallel.h"
#include "torch/tensors.h"

#ifndef FASTATTN_BUILD_FLAGS
#define FASTATTN_BUILD_FLAGS "unknown"
#endif

namespace fastattn {
namespace {

struct DropoutMask {
  bool* keep;  // [B * H, Lq, Lk]
  int64_t rows, Lq, Lk;
  uint64_t seed, offset;
  double p;
  int workers;
};

void fill_dropout_mask(void* arg, int worker) {
  const DropoutMask& mask = *static_cast<const DropoutMask*>(arg);
  const uint32_t threshold = dropout_threshold(mask.p);
  for (int64_t row = worker; row < mask.rows; row += mask.workers) {
    for (int64_t j = 0; j < mask.Lk; ++j) {
      mask.keep[row * mask.Lk + j] =
          mask.p < 1.0 && dropout_keeps(mask.seed, mask.offset, row / mask.Lq, row % mask.Lq, j, threshold);
    }
  }
}

}  // namespace

Tensor dropout_mask(const Tensor& rng_state, int64_t B, int64_t H, int64_t Lq, int64_t Lk, double p) {
  check_dropout_mask(rng_state, B, H, Lq, Lk, p);
  Tensor result = empty_contiguous(std::array{B, H, Lq, Lk}, aoti_torch_dtype_bool());
  const auto* state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  const cpu::Parallel parallel = torch_parallel();
  DropoutMask mask{static_cast<bool*>(result.mutable_data_ptr()),
                   result.numel() > 0 ? B * H * Lq : 0,
                   Lq,
                   Lk,
                   static_cast<uint64_t>(state[0]),
                   static_cast<uint64_t>(state[rng_state.stride(0)]),
                   p,
                   parallel.threads};
  parallel.run(parallel, mask.workers, fill_dropout_mask, &mask);
  return result;
}

void set_isa(std::string name) {
  cpu::Isa level;
  if (!cpu::isa_from_name(name.c_str(), &level)) {
    value_error("CPU capability \"", name, "\" is unknown; it must be one of baseline, avx2, avx512, avx512_bf16.");
  }
  if (!cpu::isa_supported(level)) {
    value_error("CPU capability \"", name, "\" is not supported by this processor or build; choose one of ",
                supported_isas(), ".");
  }
  cpu::set_active_isa(level);
}

std::string isa() { return cpu::isa_name(cpu::active_isa()); }

std::string supported_isas() {
  std::string names;
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    const auto level = static_cast<cpu::Isa>(i);
    if (!cpu::isa_supported(level)) continue;
    if (!names.empty()) names += ",";
    names += cpu::isa_name(level);
  }
  return names;
}

double measure_peak(std::string dtype, int64_t threads) {
  if (dtype != "float32" && dtype != "bfloat16") {
    value_error("dtype is \"", dtype, "\"; peaks are measured for \"float32\" and \"bfloat16\".");
  }
  if (threads < 1) value_error("threads is ", threads, "; it must be at least 1.");
  const int limit = static_cast<int>(std::min<int64_t>(threads, std::numeric_limits<int>::max()));
  return cpu::measure_peak_flops(dtype == "float32" ? DType::kFloat32 : DType::kBFloat16, torch_parallel(limit));
}

std::string build_info() {
#define FASTATTN_STRING_(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING_(x)
  return "compiler: " __VERSION__
         "\n"
         "flags: " FASTATTN_BUILD_FLAGS
         "\n"
         "torch headers: " FASTATTN_STRING(TORCH_VERSION_MAJOR) "." FASTATTN_STRING(TORCH_VERSION_MINOR) "\n"
         "torch ABI: " FASTATTN_STRING(TORCH_TARGET_VERSION);
}

}  // namespace fastattn
