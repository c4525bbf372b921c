// The primitives of cuda/ptx.cuh for the host, thin covers of what the emulator does. Included by that file alone.
//
// The last argument names the caller in reports; kernels leave it out.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "testing/emulator/primitives.h"

#define FASTATTN_DEVICE static inline
#define FASTATTN_ALWAYS_INLINE inline

namespace fastattn::cuda {

using emulator::Site;

FASTATTN_DEVICE int thread_index() { return emulator::device::thread_index(); }
FASTATTN_DEVICE int64_t block_index() { return emulator::device::block_index(); }
FASTATTN_DEVICE int64_t grid_blocks() { return emulator::device::grid_blocks(); }
FASTATTN_DEVICE SharedAddress shared_base() { return emulator::device::shared_base(); }

FASTATTN_DEVICE uint32_t opaque(uint32_t x) { return x; }

FASTATTN_DEVICE void sync_block(Site site = Site::current()) { emulator::device::sync_block(site); }
FASTATTN_DEVICE void sync_warp(Site site = Site::current()) { emulator::device::sync_warp(site); }
// Nothing to do: the matrix instructions wait for all lanes here.
FASTATTN_DEVICE void reconverge() {}

FASTATTN_DEVICE float shuffle_xor(float x, int lane_mask, Site site = Site::current()) {
  return std::bit_cast<float>(emulator::device::shuffle_xor(std::bit_cast<uint32_t>(x), lane_mask, site));
}
FASTATTN_DEVICE uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site = Site::current()) {
  return emulator::device::shuffle_xor(x, lane_mask, site);
}

// ---- Matrix fragments ----------------------------------------------------------------------------------------------

FASTATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, Site site = Site::current()) {
  emulator::device::ldmatrix(r, row, false, site);
}
FASTATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, Site site = Site::current()) {
  emulator::device::ldmatrix(r, row, true, site);
}
FASTATTN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Site site = Site::current()) {
  emulator::device::mma_bf16(d, a, b0, b1, site);
}
FASTATTN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             Site site = Site::current()) {
  emulator::device::mma_f16(d, a, b0, b1, site);
}
FASTATTN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Site site = Site::current()) {
  emulator::device::mma_tf32(d, a, b0, b1, site);
}

// ---- Copies --------------------------------------------------------------------------------------------------------

FASTATTN_DEVICE void cp_async_16(SharedAddress dst, const void* src, int bytes, Site site = Site::current()) {
  emulator::device::cp_async(dst, src, bytes, site);
}
FASTATTN_DEVICE void cp_async_commit(Site site = Site::current()) { emulator::device::cp_async_commit(site); }
template <int kPending>
FASTATTN_DEVICE void cp_async_wait(Site site = Site::current()) {
  emulator::device::cp_async_wait(kPending, site);
}

FASTATTN_DEVICE uint32_t load_shared_u32(SharedAddress at, Site site = Site::current()) {
  uint32_t x;
  emulator::device::load_shared_4(at, &x, site);
  return x;
}
FASTATTN_DEVICE float load_shared_f32(SharedAddress at, Site site = Site::current()) {
  float x;
  emulator::device::load_shared_4(at, &x, site);
  return x;
}
FASTATTN_DEVICE U32x4 load_shared_u32x4(SharedAddress at, Site site = Site::current()) {
  U32x4 v;
  emulator::device::load_shared_16(at, &v, site);
  return v;
}
FASTATTN_DEVICE F32x4 load_shared_f32x4(SharedAddress at, Site site = Site::current()) {
  F32x4 v;
  emulator::device::load_shared_16(at, &v, site);
  return v;
}
FASTATTN_DEVICE void store_shared_u32(SharedAddress at, uint32_t x, Site site = Site::current()) {
  emulator::device::store_shared_4(at, &x, site);
}
FASTATTN_DEVICE void store_shared_f32(SharedAddress at, float x, Site site = Site::current()) {
  emulator::device::store_shared_4(at, &x, site);
}
FASTATTN_DEVICE void store_shared_u32x4(SharedAddress at, U32x4 v, Site site = Site::current()) {
  emulator::device::store_shared_16(at, &v, site);
}
FASTATTN_DEVICE void store_shared_f32x4(SharedAddress at, F32x4 v, Site site = Site::current()) {
  emulator::device::store_shared_16(at, &v, site);
}

FASTATTN_DEVICE U32x4 load_global_u32x4(const void* at, Site site = Site::current()) {
  emulator::device::check_global(at, 16, site);
  U32x4 v;
  std::memcpy(&v, at, sizeof(v));
  return v;
}
FASTATTN_DEVICE void store_global_u32x4(void* at, U32x4 v, Site site = Site::current()) {
  emulator::device::check_global(at, 16, site);
  std::memcpy(at, &v, sizeof(v));
}
FASTATTN_DEVICE U32x2 load_global_u32x2(const void* at, Site site = Site::current()) {
  emulator::device::check_global(at, 8, site);
  U32x2 v;
  std::memcpy(&v, at, sizeof(v));
  return v;
}
FASTATTN_DEVICE void store_global_u32x2(void* at, U32x2 v, Site site = Site::current()) {
  emulator::device::check_global(at, 8, site);
  std::memcpy(at, &v, sizeof(v));
}

// ---- Numbers -------------------------------------------------------------------------------------------------------

FASTATTN_DEVICE int lowest_bit(uint32_t x) { return std::countr_zero(x); }

FASTATTN_DEVICE uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
FASTATTN_DEVICE float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

// Through memory, past any contraction into a fused multiply-add.
FASTATTN_DEVICE float multiply(float x, float y) {
  const volatile float product = x * y;
  return product;
}
FASTATTN_DEVICE float add(float x, float y) {
  const volatile float sum = x + y;
  return sum;
}

FASTATTN_DEVICE float multiply_add(float x, float y, float z) { return std::fma(x, y, z); }

FASTATTN_DEVICE float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // a NaN stays one
}

FASTATTN_DEVICE float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
FASTATTN_DEVICE float reciprocal_approx(float x) { return without_subnormals(1.0f / without_subnormals(x)); }

FASTATTN_DEVICE uint32_t to_tf32(float x) {
  if (x != x) return 0x7fffffffu;
  return (float_bits(x) + 0x1000u) & ~0x1fffu;
}

FASTATTN_DEVICE uint32_t to_bf16(float x) {
  if (x != x) return 0x7fffu;
  const uint32_t bits = float_bits(x);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
FASTATTN_DEVICE uint32_t to_f16(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000u, magnitude = float_bits(x) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Below the smallest normal number: adding 0.5 leaves units of 2^-24 in the last bits, rounded by the addition.
    return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}
FASTATTN_DEVICE uint32_t pack_bf16(float lo, float hi) { return to_bf16(lo) | to_bf16(hi) << 16; }
FASTATTN_DEVICE uint32_t pack_f16(float lo, float hi) { return to_f16(lo) | to_f16(hi) << 16; }

FASTATTN_DEVICE float bf16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }
FASTATTN_DEVICE float f16_to_float(uint16_t bits) {
  // As a float with the exponent's bias still that of a half: exact for subnormal numbers as well.
  const uint32_t magnitude = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;
  return bits_float(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : float_bits(scaled)));
}

}  // namespace fastattn::cuda
