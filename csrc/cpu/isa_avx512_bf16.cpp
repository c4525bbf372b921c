// Level "avx512_bf16": AVX-512 with bfloat16 and 16-bit integer dot products. Nothing here may have external linkage
// but the kernel table.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512_bf16
#define FASTATTN_BF16_DOT 1
#define FASTATTN_REST avx512

#include "cpu/simd/avx512.h"

#include "cpu/instantiate.h"

FASTATTN_END_TARGET
#endif
