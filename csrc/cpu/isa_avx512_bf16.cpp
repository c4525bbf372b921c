// Level "avx512_bf16": AVX-512 with bfloat16 and 8-bit dot products. The pragma makes this whole file a target region;
// nothing here may have external linkage but the kernel table.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")
#define FASTATTN_ISA avx512_bf16
#define FASTATTN_BF16_DOT 1
#define FASTATTN_REST avx512

#include "cpu/simd/avx512.h"

#include "cpu/instantiate.h"
#endif
