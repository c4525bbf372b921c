// What _C_cuda adds to the operators that _C_cpu defines, which has to be loaded first.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/attention.h"
#include "torch/operators.h"

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { fastattn::register_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_cuda_build_info", TORCH_BOX(&fastattn::cuda::build_info));
}
