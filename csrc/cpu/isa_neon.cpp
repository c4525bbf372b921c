// Level "neon": any 64-bit ARM. Nothing here may have external linkage but the kernel table.
#if defined(__aarch64__)
#define FASTATTN_ISA neon
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/neon.h"

#include "cpu/instantiate.h"

FASTATTN_END_TARGET
#endif
