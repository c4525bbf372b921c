// What compilers say differently: function qualifiers, target regions, sanitizers. No other file asks which compiler
// reads it.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__) && !defined(__CUDACC__)
#error "fastattn: build with clang-cl: MSVC's own compiler has no vector extensions"
#endif

// Every function in core/ is compiled once per instruction set on the CPU and again by nvcc. It therefore has internal
// linkage and is always inlined: an ordinary inline function would be emitted as a weak symbol, the linker would keep
// one copy of the many, and AVX-512 code could end up running on an AVX2 machine.
#define FASTATTN_INLINE inline __attribute__((always_inline))  // for members, which cannot be static
#if defined(__CUDACC__)
#define FASTATTN_FN static __host__ __device__ __forceinline__
#else
#define FASTATTN_FN static FASTATTN_INLINE
#endif

// FASTATTN_BEGIN_TARGET("avx2,fma") and, at the end of the file, FASTATTN_END_TARGET: what is defined between them may
// use these instructions. The headers of intrinsics and of the C library come before, for Clang would make a target of
// their declarations too. GCC makes templates into functions at the end of a file, with what is in force there, so that
// its regions have no end.
#define FASTATTN_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define FASTATTN_BEGIN_TARGET(features) \
  FASTATTN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTATTN_END_TARGET FASTATTN_PRAGMA(clang attribute pop)
#else
#define FASTATTN_BEGIN_TARGET(features) FASTATTN_PRAGMA(GCC target(features))
#define FASTATTN_END_TARGET
#endif

// Around the headers of intrinsics: GCC 12 takes the deliberately undefined registers of its own for mistakes.
#if defined(__clang__)
#define FASTATTN_BEGIN_INTRINSICS
#define FASTATTN_END_INTRINSICS
#else
#define FASTATTN_BEGIN_INTRINSICS                           \
  FASTATTN_PRAGMA(GCC diagnostic push)                      \
  FASTATTN_PRAGMA(GCC diagnostic ignored "-Wuninitialized") \
  FASTATTN_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")
#define FASTATTN_END_INTRINSICS FASTATTN_PRAGMA(GCC diagnostic pop)
#endif

// Whether NEON's bfloat16 intrinsics are there inside a target region: Clang before 16 (Apple's before 15) has them
// only where the whole file is compiled for such a processor.
#if !defined(__aarch64__)
#define FASTATTN_HAS_NEON_BF16 0
#elif defined(__apple_build_version__)
#define FASTATTN_HAS_NEON_BF16 (__clang_major__ >= 15)
#elif defined(__clang__)
#define FASTATTN_HAS_NEON_BF16 (__clang_major__ >= 16)
#else
#define FASTATTN_HAS_NEON_BF16 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#define FASTATTN_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTATTN_ADDRESS_SANITIZER 1
#endif
#endif
#if !defined(FASTATTN_ADDRESS_SANITIZER)
#define FASTATTN_ADDRESS_SANITIZER 0
#endif
