// Level "neon_bf16": NEON with bfloat16 dot products. Nothing here may have external linkage but the kernel table.
#include "core/macros.h"

#if FASTATTN_HAS_NEON_BF16
#define FASTATTN_ISA neon_bf16
#define FASTATTN_BF16_DOT 1
#define FASTATTN_REST neon

#include "cpu/simd/neon.h"

#include "cpu/instantiate.h"

FASTATTN_END_TARGET
#endif
