// The vocabulary of level "avx512_bf16".
#include "testing/simd/levels.h"

#if defined(__x86_64__)
#define FASTATTN_ISA avx512_bf16
#define FASTATTN_BF16_DOT 1

#include "cpu/simd/avx512.h"

#include "testing/simd/checks.h"

FASTATTN_END_TARGET
#endif
