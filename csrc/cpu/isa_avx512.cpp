// Level "avx512": AVX-512 F, BW, DQ and VL. Nothing here may have external linkage but the kernel table.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/avx512.h"

#include "cpu/instantiate.h"

FASTATTN_END_TARGET
#endif
