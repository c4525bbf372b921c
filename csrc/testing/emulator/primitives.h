// What device.h puts the primitives' names and types over: the calling thread's side of the emulator.
#pragma once

#include <cstdint>

#include "testing/emulator/emulator.h"

namespace fastattn::emulator {

enum class MmaType : uint8_t { kBf16, kF16, kTf32 };

// In a namespace of their own: a Site among the arguments would make them candidates beside those of fastattn::cuda.
namespace device {

// Constant for the thread that asks, for as long as it runs.
[[gnu::const]] int thread_index();
[[gnu::const]] int64_t block_index();
[[gnu::const]] int64_t grid_blocks();
[[gnu::const]] uint32_t shared_base();

void sync_block(Site site);
void sync_warp(Site site);
uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site);
void ldmatrix(uint32_t* r, uint32_t row, bool is_transposed, Site site);
void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void mma_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void cp_async(uint32_t dst, const void* src, int bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending, Site site);
void load_shared_4(uint32_t at, void* x, Site site);
void load_shared_16(uint32_t at, void* x, Site site);
void store_shared_4(uint32_t at, const void* x, Site site);
void store_shared_16(uint32_t at, const void* x, Site site);
void check_global(const void* at, int bytes, Site site);

}  // namespace device
}  // namespace fastattn::emulator
