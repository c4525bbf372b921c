// Call sites: numbered, counted, and where a fault is planted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "testing/emulator/emulator.h"

namespace fastattn::emulator {

struct SiteInfo {
  Site site;
  SiteKind kind;
  bool is_skipped;
  uint64_t calls = 0, bank_conflicts = 0;
};

// Numbers are those of the order in which sites are first met.
class SiteTable {
 public:
  void start(const SkipSite& skip) {
    sites_.clear();
    index_.clear();
    std::fill(std::begin(recent_), std::end(recent_), Recent{});
    skip_ = skip;
  }

  [[gnu::always_inline]] inline uint32_t find(Site site, SiteKind kind) {
    const uintptr_t hash = reinterpret_cast<uintptr_t>(site.file) + static_cast<uintptr_t>(site.line) * 13 +
                           static_cast<uintptr_t>(kind) * 101;
    Recent& recent = recent_[hash % kRecent];
    if (recent.file != site.file || recent.line != site.line || recent.kind != kind) [[unlikely]] {
      recent = {site.file, site.line, kind, look_up(site, kind)};
    }
    return recent.id;
  }
  SiteInfo& operator[](uint32_t id) { return sites_[id]; }
  const SiteInfo& operator[](uint32_t id) const { return sites_[id]; }
  const std::vector<SiteInfo>& all() const { return sites_; }

 private:
  static constexpr size_t kRecent = 256;
  struct Recent {
    const char* file = nullptr;
    int line = 0;
    SiteKind kind = SiteKind::kBarrier;
    uint32_t id = 0;
  };

  [[gnu::noinline, gnu::cold]] uint32_t look_up(Site site, SiteKind kind) {
    const auto [at, is_new] = index_.try_emplace({site.file, site.line, kind}, static_cast<uint32_t>(sites_.size()));
    if (is_new) {
      const std::string file = site.file;
      const bool is_skipped = skip_.line == site.line && skip_.kind == kind && file.ends_with(skip_.file);
      sites_.push_back({site, kind, is_skipped});
    }
    return at->second;
  }

  Recent recent_[kRecent];
  std::map<std::tuple<std::string, int, SiteKind>, uint32_t> index_;
  std::vector<SiteInfo> sites_;
  SkipSite skip_;
};

}  // namespace fastattn::emulator
