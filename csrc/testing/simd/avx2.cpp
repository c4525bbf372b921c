// The vocabulary of level "avx2".
#include "testing/simd/levels.h"

#if defined(__x86_64__)
#define FASTATTN_ISA avx2
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/avx2.h"

#include "testing/simd/checks.h"

FASTATTN_END_TARGET
#endif
