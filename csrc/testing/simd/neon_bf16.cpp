// The vocabulary of level "neon_bf16".
#include "testing/simd/levels.h"

#if FASTATTN_HAS_NEON_BF16
#define FASTATTN_ISA neon_bf16
#define FASTATTN_BF16_DOT 1

#include "cpu/simd/neon.h"

#include "testing/simd/checks.h"

FASTATTN_END_TARGET
#endif
