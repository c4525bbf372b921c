// The parts of _fastattn_core, each of which adds its functions to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace fastattn::testing {

// Hard attention and the summary of attention weights on the CPU.
void bind_hard(pybind11::module_& m);

// The CUDA engine on the emulator, and its plans.
void bind_cuda(pybind11::module_& m);

// Its append to a cache.
void bind_cuda_cache(pybind11::module_& m);

// Hard attention and the summary of it, likewise.
void bind_cuda_hard(pybind11::module_& m);

}  // namespace fastattn::testing
