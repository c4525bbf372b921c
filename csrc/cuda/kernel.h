// What every launcher reads off a kernel, without any runtime: see engine.cuh for what a launcher is.
#pragma once

namespace fastattn::cuda {

// Bytes of shared memory for one launch: kSharedBytes, or fewer where the kernel counts columns at run time.
template <class Kernel>
int launch_shared_bytes(const typename Kernel::Params& params) {
  if constexpr (requires { Kernel::shared_bytes(params); }) return Kernel::shared_bytes(params);
  return Kernel::kSharedBytes;
}

}  // namespace fastattn::cuda
