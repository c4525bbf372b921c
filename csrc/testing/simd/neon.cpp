// The vocabulary of level "neon".
#include "testing/simd/levels.h"

#if defined(__aarch64__)
#define FASTATTN_ISA neon
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/neon.h"

#include "testing/simd/checks.h"

FASTATTN_END_TARGET
#endif
