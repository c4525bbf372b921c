// The kernels' threads are torch's own.
#pragma once

#include "cpu/parallel.h"

namespace fastattn {

// As many threads as torch.get_num_threads() says now; at most max_threads.
cpu::Parallel torch_parallel(int max_threads);
cpu::Parallel torch_parallel();

}  // namespace fastattn
