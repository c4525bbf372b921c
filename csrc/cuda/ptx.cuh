// The instructions that C++ has no words for, one thin function each. This is the only file with inline PTX.
//
// Compiled by nvcc, each is the instruction it is named after; compiled for the host, the same names come from the
// emulator, which plays a GPU with one fiber per thread. All accesses to shared memory go through here, by address, so
// that the emulator sees every one of them. Everything needs sm_80 and nothing later.
//
// PTX ISA 8.5, sections 9.7.8.25 (cp.async), 9.7.14.5 (mma, ldmatrix; figures give the fragment layouts).
#pragma once

#include <cstdint>

namespace fastattn::cuda {

using SharedAddress = uint32_t;  // a byte's place in the shared memory window
struct alignas(8) U32x2 {
  uint32_t x[2];
};
struct alignas(16) U32x4 {
  uint32_t x[4];
};
struct alignas(16) F32x4 {
  float x[4];
};

}  // namespace fastattn::cuda

#if !defined(__CUDACC__)

#include "testing/emulator/device.h"  // defines FASTATTN_DEVICE (static) and FASTATTN_ALWAYS_INLINE (members) as well

#else

#define FASTATTN_DEVICE static __device__ __forceinline__
#define FASTATTN_ALWAYS_INLINE __device__ __forceinline__

namespace fastattn::cuda {

FASTATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int64_t block_index() { return blockIdx.x; }
FASTATTN_DEVICE int64_t grid_blocks() { return gridDim.x; }

FASTATTN_DEVICE SharedAddress shared_base() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared));
}

// x, of which the compiler knows nothing more. Addresses that follow from it are computed where they are used, and not
// kept in registers throughout a loop, where accumulators need them more.
FASTATTN_DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

FASTATTN_DEVICE void sync_block() { __syncthreads(); }
FASTATTN_DEVICE void sync_warp() { __syncwarp(); }

// Lanes may have parted over their scores, and PTX does not promise that they meet again by themselves; the matrix
// instructions want the whole warp. It orders no accesses to memory, which is sync_warp's task.
FASTATTN_DEVICE void reconverge() { __syncwarp(); }

FASTATTN_DEVICE float shuffle_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
FASTATTN_DEVICE uint32_t shuffle_xor(uint32_t x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }

// ---- Matrix fragments ----------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. As four-byte elements
// the same instruction loads four 8 x 4 matrices.
FASTATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FASTATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a b, accumulated in float. m16n8k16.
FASTATTN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTATTN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// m16n8k8; of each operand the low 13 bits do not count.
FASTATTN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Copies --------------------------------------------------------------------------------------------------------

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros, past L1. Both addresses are multiples of 16; with
// bytes = 0 nothing is read.
FASTATTN_DEVICE void cp_async_16(SharedAddress dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
               "r"(bytes)
               : "memory");
}
FASTATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of the groups that this thread committed are still under way.
template <int kPending>
FASTATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

FASTATTN_DEVICE uint32_t load_shared_u32(SharedAddress at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
FASTATTN_DEVICE float load_shared_f32(SharedAddress at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
}
FASTATTN_DEVICE U32x4 load_shared_u32x4(SharedAddress at) {
  U32x4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "r"(at)
               : "memory");
  return v;
}
FASTATTN_DEVICE F32x4 load_shared_f32x4(SharedAddress at) {
  F32x4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x[0]), "=f"(v.x[1]), "=f"(v.x[2]), "=f"(v.x[3])
               : "r"(at)
               : "memory");
  return v;
}
FASTATTN_DEVICE void store_shared_u32(SharedAddress at, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
FASTATTN_DEVICE void store_shared_f32(SharedAddress at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
FASTATTN_DEVICE void store_shared_u32x4(SharedAddress at, U32x4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3])
               : "memory");
}
FASTATTN_DEVICE void store_shared_f32x4(SharedAddress at, F32x4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x[0]), "f"(v.x[1]), "f"(v.x[2]), "f"(v.x[3])
               : "memory");
}

FASTATTN_DEVICE U32x4 load_global_u32x4(const void* at) {
  const uint4 v = *static_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}
FASTATTN_DEVICE void store_global_u32x4(void* at, U32x4 v) {
  *static_cast<uint4*>(at) = make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
FASTATTN_DEVICE U32x2 load_global_u32x2(const void* at) {
  const uint2 v = *static_cast<const uint2*>(at);
  return {{v.x, v.y}};
}
FASTATTN_DEVICE void store_global_u32x2(void* at, U32x2 v) { *static_cast<uint2*>(at) = make_uint2(v.x[0], v.x[1]); }

// ---- Numbers -------------------------------------------------------------------------------------------------------

// Rounded by itself: never part of a fused multiply-add, so that a score has the same bits in every kernel. Beside a
// bias of -1e9 the last bit of a score is a factor of e^64.
FASTATTN_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
FASTATTN_DEVICE float add(float x, float y) { return __fadd_rn(x, y); }
// x y + z, rounded once, on every device: where it matters, it is not left to the compiler.
FASTATTN_DEVICE float multiply_add(float x, float y, float z) { return __fmaf_rn(x, y, z); }
// Within 2 ulp; subnormal results are 0, and exp2(-inf) = 0.
FASTATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Within 1 ulp; subnormal numbers count as 0, of what is given and of what comes of it: 1 / 0 = inf, 1 / inf = 0.
FASTATTN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The nearest number with ten bits behind the point, ties away from zero.
FASTATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// The number of the lowest bit that is set, of x != 0.
FASTATTN_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

FASTATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FASTATTN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// Two numbers in one register, lo in bits 0 to 15.
FASTATTN_DEVICE uint32_t pack_bf16(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
FASTATTN_DEVICE uint32_t pack_f16(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
FASTATTN_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
FASTATTN_DEVICE float f16_to_float(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

}  // namespace fastattn::cuda

#endif
