// The implementations of the operators that work on tensors: the same code for every device, above its engine.h.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastattn {

void register_operators(torch::stable::detail::StableLibrary& library);

}  // namespace fastattn
