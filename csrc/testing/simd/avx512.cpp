// The vocabulary of level "avx512".
#include "testing/simd/levels.h"

#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/avx512.h"

#include "testing/simd/checks.h"

FASTATTN_END_TARGET
#endif
