// The primitives as the calling thread meets them.
#include "testing/emulator/primitives.h"

#include <cstring>

#include "testing/emulator/scheduler.h"

namespace fastattn::emulator {
namespace {

Actor make_actor(const Thread& thread, uint32_t site) { return static_cast<Actor>(thread.index) | site << kThreadBits; }

// Addresses below the window wrap around to beyond it.
[[gnu::always_inline]] inline uint32_t offset_of(const Block& block, uint32_t at, uint32_t bytes, const char* what,
                                                 Site site) {
  const uint32_t offset = at - kSharedBase;
  if (at % bytes != 0 || uint64_t{offset} + bytes > block.shared.bytes()) [[unlikely]] {
    block.fail_address(what, at, bytes, site);
  }
  return offset;
}

[[gnu::always_inline]] inline void check(const Block& block, SharedMemory::Finding finding, const char* verb,
                                         uint32_t offset, Actor actor) {
  if (finding.conflict != SharedMemory::Conflict::kNone) [[unlikely]]
    block.fail_race(finding, verb, offset, actor);
}

// The place of one lane's access of its own.
template <uint32_t kBytes, bool kIsStore>
[[gnu::always_inline]] inline unsigned char* access(uint32_t at, Site site) {
  const Thread& self = *current;
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  SharedMemory& shared = block.shared;
  const uint32_t offset = offset_of(block, at, kBytes, kIsStore ? "a store" : "a load", site);
  if (block.options.count_bank_conflicts || block.options.detect_races) {
    const uint32_t id = block.sites.find(site, kIsStore ? SiteKind::kStoreShared : SiteKind::kLoadShared);
    if (block.options.count_bank_conflicts) warp.log.add(self.lane, id, offset, kBytes == 16);
    if (block.options.detect_races) {
      const Accessor who{make_actor(self, id), warp.step_clock};
      SharedMemory::Finding finding;
      if constexpr (kBytes == 16) {
        finding = kIsStore ? shared.write_chunk(offset, who) : shared.read_chunk(offset, who);
      } else {
        finding = kIsStore ? shared.write_word(offset, who) : shared.read_word(offset, who);
      }
      check(block, finding, kIsStore ? "writes" : "reads", offset, who.actor);
    }
  }
  return shared.data() + offset;
}

}  // namespace

namespace device {

int thread_index() { return current->index; }
int64_t block_index() { return current->warp->block->block_index; }
int64_t grid_blocks() { return current->warp->block->grid_blocks; }
uint32_t shared_base() { return kSharedBase; }

void sync_block(Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  SiteInfo& info = block.sites[block.sites.find(site, SiteKind::kBarrier)];
  if (info.is_skipped) return;
  ++info.calls;
  if (!self.copies->all.empty()) block.land_some(*self.copies);
  block.wait_at_barrier(self, site);
}

void sync_warp(Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  if (block.options.skip_site.kind == SiteKind::kWarpBarrier && block.options.skip_site.line == site.line &&
      block.sites[block.sites.find(site, SiteKind::kWarpBarrier)].is_skipped) {
    return;
  }
  block.meet(self, SiteKind::kWarpBarrier, site, [&](Warp& warp, uint32_t) { warp.step_clock = block.shared.tick(); });
}

uint32_t shuffle_xor(uint32_t x, int lane_mask, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  warp.value[self.lane] = x;
  warp.lane_mask[self.lane] = static_cast<uint32_t>(lane_mask);
  warp.block->meet(self, SiteKind::kShuffle, site, [](Warp& w, uint32_t) {
    for (uint32_t lane = 0; lane < 32; ++lane) w.result[0][lane] = w.value[(lane ^ w.lane_mask[lane]) % 32];
  });
  return warp.result[0][self.lane];
}

void ldmatrix(uint32_t* r, uint32_t row, bool is_transposed, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  warp.value[self.lane] = offset_of(block, row, 16, "a row of ldmatrix", site);
  block.meet(self, SiteKind::kLdmatrix, site, [&block, is_transposed](Warp& w, uint32_t id) {
    if (block.options.detect_races) {
      for (uint32_t lane = 0; lane < 32; ++lane) {
        const Accessor who{make_actor(w.lanes[lane], id), w.step_clock};
        check(block, block.shared.read_chunk_as_warp(w.value[lane], who), "reads", w.value[lane], who.actor);
      }
    }
    if (block.options.count_bank_conflicts) {
      int conflicts = 0;
      for (uint32_t lane = 0; lane < 32; lane += 8) conflicts += chunk_conflicts(w.value + lane, 0xff);
      block.sites[id].bank_conflicts += static_cast<uint64_t>(conflicts);
    }
    const unsigned char* data = block.shared.data();
    // A lane's word is two neighbours in a row of the matrix, or of its transpose.
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      const uint32_t* at = w.value + 8 * matrix;
      if (is_transposed) {
        transpose_8x8(data, at, w.result[matrix]);
      } else {
        for (uint32_t n = 0; n < 8; ++n) std::memcpy(w.result[matrix] + 4 * n, data + at[n], 16);
      }
    }
  });
  for (uint32_t matrix = 0; matrix < 4; ++matrix) r[matrix] = warp.result[matrix][self.lane];
}

namespace {

template <MmaType kType>
[[gnu::always_inline]] inline void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  uint32_t* const operand_a = warp.mma.a + self.mma_a;
  operand_a[0] = a[0];
  operand_a[8 * 8] = a[1];
  operand_a[4] = a[2];
  operand_a[8 * 8 + 4] = a[3];
  uint32_t* const operand_b = warp.mma.b + self.mma_b;
  operand_b[0] = b0;
  operand_b[4 * 8] = b1;
  float* const c = warp.mma.c + self.mma_c;
  std::memcpy(c, d, 8);
  std::memcpy(c + 8 * 8, d + 2, 8);
  warp.block->meet(self, SiteKind::kMma, site, [](Warp& w, uint32_t) { w.block->mma[static_cast<int>(kType)](w.mma); });
  std::memcpy(d, c, 8);
  std::memcpy(d + 2, c + 8 * 8, 8);
}

}  // namespace

void mma_bf16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  mma<MmaType::kBf16>(d, a, b0, b1, site);
}
void mma_f16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  mma<MmaType::kF16>(d, a, b0, b1, site);
}
void mma_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  mma<MmaType::kTf32>(d, a, b0, b1, site);
}

void cp_async(uint32_t dst, const void* src, int bytes, Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  const uint32_t offset = offset_of(block, dst, 16, "cp_async_16", site);
  if (bytes < 0 || bytes > 16) {
    block.fail("cp_async_16 of ", bytes, " bytes (", describe(site), ")");
  }
  check_global(src, 16, site);
  const uint32_t id = block.sites.find(site, SiteKind::kCpAsync);
  ++block.sites[id].calls;
  if (block.options.detect_races) {
    const Accessor who{make_actor(self, id), self.warp->step_clock};
    check(block, block.shared.begin_copy(offset, who), "starts a copy to", offset, who.actor);
  }
  Copy copy{src, offset, static_cast<uint8_t>(bytes), false};
  const CopyTiming timing = block.options.cp_async_timing;
  if (timing == CopyTiming::kAtIssue || (timing == CopyTiming::kRandom && block.random.next() % 4 == 0)) {
    block.land(copy);
  } else {
    std::memset(block.shared.data() + offset, 0xff, 16);  // NaNs: until then, what is there is nobody's to read
  }
  self.copies->all.push_back(copy);
}

void cp_async_commit(Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  ++block.sites[block.sites.find(site, SiteKind::kCpAsyncCommit)].calls;
  if (!self.copies->all.empty()) block.land_some(*self.copies);
  self.copies->group_ends.push_back(static_cast<uint32_t>(self.copies->all.size()));
}

void cp_async_wait(int pending, Site site) {
  Thread& self = *current;
  Block& block = *self.warp->block;
  SiteInfo& info = block.sites[block.sites.find(site, SiteKind::kCpAsyncWait)];
  if (info.is_skipped) return;
  ++info.calls;
  if (!self.copies->all.empty()) block.land_some(*self.copies);
  block.wait_for_copies(*self.copies, static_cast<size_t>(pending));
}

void load_shared_4(uint32_t at, void* x, Site site) { std::memcpy(x, access<4, false>(at, site), 4); }
void load_shared_16(uint32_t at, void* x, Site site) { std::memcpy(x, access<16, false>(at, site), 16); }
void store_shared_4(uint32_t at, const void* x, Site site) { std::memcpy(access<4, true>(at, site), x, 4); }
void store_shared_16(uint32_t at, const void* x, Site site) { std::memcpy(access<16, true>(at, site), x, 16); }

void check_global(const void* at, int bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(bytes) == 0) [[likely]]
    return;
  current->warp->block->fail(bytes, " bytes of global memory at an address that is no multiple of ", bytes, " (",
                             describe(site), ")");
}

}  // namespace device
}  // namespace fastattn::emulator
