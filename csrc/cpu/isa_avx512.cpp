// Level "avx512": AVX-512 F, BW, DQ and VL. The pragma makes this whole file a target region; nothing here may have
// external linkage but the kernel table.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTATTN_ISA avx512
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/avx512.h"

#include "cpu/instantiate.h"
#endif
