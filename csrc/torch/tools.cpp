#include "torch/tools.h"

#include <torch/headeronly/version.h>

#include <algorithm>
#include <limits>

#include "cpu/attention.h"
#include "torch/errors.h"
#include "torch/parallel.h"
#include "torch/tensors.h"

#ifndef FASTATTN_BUILD_FLAGS
#define FASTATTN_BUILD_FLAGS "unknown"
#endif

namespace fastattn {

namespace {

std::string isa_names(bool only_supported, const char* separator) {
  std::string names;
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    const auto level = static_cast<cpu::Isa>(i);
    if (only_supported && !cpu::isa_supported(level)) continue;
    if (!names.empty()) names += separator;
    names += cpu::isa_name(level);
  }
  return names;
}

}  // namespace

void set_isa(std::string name) {
  cpu::Isa level;
  if (!cpu::isa_from_name(name.c_str(), &level)) {
    value_error("CPU capability \"", name, "\" is unknown; it must be one of ", isa_names(false, ", "), ".");
  }
  if (!cpu::isa_supported(level)) {
    value_error("CPU capability \"", name, "\" is not supported by this processor or build; choose one of ",
                isa_names(true, ", "), ".");
  }
  cpu::set_active_isa(level);
}

std::string isa() { return cpu::isa_name(cpu::active_isa()); }

std::string all_isas() { return isa_names(false, ","); }

std::string supported_isas() { return isa_names(true, ","); }

namespace {

cpu::Parallel parallel_of(int64_t threads) {
  if (threads < 1) value_error("threads is ", threads, "; it must be at least 1.");
  return torch_parallel(static_cast<int>(std::min<int64_t>(threads, std::numeric_limits<int>::max())));
}

}  // namespace

double measure_peak(std::string dtype, int64_t threads) {
  if (dtype != "float32" && dtype != "bfloat16") {
    value_error("dtype is \"", dtype, "\"; peaks are measured for \"float32\" and \"bfloat16\".");
  }
  return cpu::measure_peak_flops(dtype == "float32" ? DType::kFloat32 : DType::kBFloat16, parallel_of(threads));
}

namespace {

cpu::Words words_of(const char* name, const Tensor& tensor) {
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (!tensor.is_cpu() || !tensor.is_contiguous() || bytes % 8 != 0) {
    value_error(name, " has shape ", shape_text(tensor), " and ", bytes,
                " bytes; it must be contiguous, on the CPU, and hold whole words of 8 bytes: call contiguous(), or cut "
                "it.");
  }
  return {static_cast<const uint64_t*>(tensor.const_data_ptr()), bytes / 8};
}

}  // namespace

int64_t sum_words(const Tensor& x, const Tensor& y) {
  return static_cast<int64_t>(cpu::sum_words({words_of("x", x), words_of("y", y)}, torch_parallel()));
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
