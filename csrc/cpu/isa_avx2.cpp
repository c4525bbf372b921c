// Level "avx2": AVX2, FMA and F16C. Nothing here may have external linkage but the kernel table, or the linker could
// hand AVX2 code to a processor without it.
#if defined(__x86_64__)
#define FASTATTN_ISA avx2
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/avx2.h"

#include "cpu/instantiate.h"

FASTATTN_END_TARGET
#endif
