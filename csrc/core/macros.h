// Function qualifiers shared by host and device code.
//
// Every function in core/ is compiled once per instruction set on the CPU and again by nvcc. It therefore has internal
// linkage and is always inlined: an ordinary inline function would be emitted as a weak symbol, the linker would keep
// one copy of the many, and AVX-512 code could end up running on an AVX2 machine.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTATTN_FN static __host__ __device__ __forceinline__
#else
#define FASTATTN_FN static inline __attribute__((always_inline))
#endif
