// How long the banks of shared memory take for what the lanes of a warp access at once.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <iterator>
#include <vector>

#include "testing/emulator/sites.h"

namespace fastattn::emulator {

// Cycles beyond the first that eight accesses of 16 bytes take together: there are eight groups of four banks.
inline int chunk_conflicts(const uint32_t* at, uint32_t lanes) {
  uint32_t groups = 0;
  for (uint32_t n = 0; n < 8; ++n) {
    if (lanes >> n & 1) groups |= 1u << (at[n] / 16 % 8);
  }
  if (groups == 0xffu) return 0;
  int most = 1, used[8] = {};
  for (uint32_t n = 0; n < 8; ++n) {
    bool is_first = lanes >> n & 1;  // of the lanes that read this address
    for (uint32_t m = 0; m < n; ++m) is_first = is_first && !((lanes >> m & 1) && at[m] == at[n]);
    if (is_first) most = std::max(most, ++used[at[n] / 16 % 8]);
  }
  return most - 1;
}

// The same for a warp's accesses of four bytes, in 32 banks.
inline int word_conflicts(const uint32_t* at, uint32_t lanes) {
  uint32_t banks = 0;
  for (uint32_t n = 0; n < 32; ++n) {
    if (lanes >> n & 1) banks |= 1u << (at[n] / 4 % 32);
  }
  if (banks == ~0u) return 0;
  int most = 1, used[32] = {};
  for (uint32_t n = 0; n < 32; ++n) {
    bool is_first = lanes >> n & 1;
    for (uint32_t m = 0; m < n; ++m) is_first = is_first && !((lanes >> m & 1) && at[m] == at[n]);
    if (is_first) most = std::max(most, ++used[at[n] / 4 % 32]);
  }
  return most - 1;
}

// The loads and stores of a warp since its last collective. Lanes run one by one, so that what they would do together
// is put together here: the n-th time that one lane is at a call site goes with the n-th time that another is.
class AccessLog {
 public:
  void add(uint32_t lane, uint32_t site, uint32_t at, bool is_chunk) {
    const uint32_t key = site << 1 | (is_chunk ? 1u : 0u), bit = 1u << lane;
    uint32_t n = place_[lane];
    if (!(parted_ & bit) && n < size_ && entries_[n].key != key) parted_ |= bit;
    if (parted_ & bit) [[unlikely]] {
      for (n = 0; n < size_ && (entries_[n].key != key || (entries_[n].lanes & bit)); ++n) {
      }
    } else {
      ++place_[lane];
    }
    if (n == size_) {
      if (size_ == entries_.size()) entries_.emplace_back();
      entries_[size_].key = key;
      entries_[size_].lanes = 0;
      ++size_;
    }
    entries_[n].lanes |= bit;
    entries_[n].at[lane] = at;
  }

  bool is_empty() const { return size_ == 0; }

  void flush(SiteTable& sites) {
    for (uint32_t n = 0; n < size_; ++n) {
      const Entry& entry = entries_[n];
      SiteInfo& info = sites[entry.key >> 1];
      info.calls += static_cast<uint64_t>(std::popcount(entry.lanes));
      int conflicts = 0;
      if (entry.key & 1) {
        for (uint32_t lane = 0; lane < 32; lane += 8) {
          conflicts += chunk_conflicts(entry.at + lane, entry.lanes >> lane & 0xffu);
        }
      } else {
        conflicts = word_conflicts(entry.at, entry.lanes);
      }
      info.bank_conflicts += static_cast<uint64_t>(conflicts);
    }
    clear();
  }

  void clear() {
    size_ = 0;
    parted_ = 0;
    std::fill(std::begin(place_), std::end(place_), 0u);
  }

 private:
  struct Entry {
    uint32_t key;  // the call site, and whether it is 16 bytes
    uint32_t lanes;
    uint32_t at[32];
  };

  std::vector<Entry> entries_;
  uint32_t size_ = 0;
  uint32_t place_[32] = {};  // the entry that the lane's next access is expected at
  uint32_t parted_ = 0;      // lanes whose accesses are not, one by one, those of the lanes before them
};

}  // namespace fastattn::emulator
