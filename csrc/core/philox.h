// Philox4x32-10, a counter-based random generator (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). A dropout decision depends on (seed, offset, b, h, i, j) alone, never on tiles, threads or lanes,
// so that every backend drops the same weights and the backward pass can draw them again.
//
//   key     = seed (64 bits)
//   counter = { j / 4, i, b * Hq + h, offset }, each taken modulo 2^32
//   weight (i, j) is kept when word j % 4 of the result is >= dropout_threshold(p)
#pragma once

#include "core/macros.h"

namespace fastattn {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t w[4];
};

FASTATTN_FN PhiloxWords philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMul0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMul1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// A weight is dropped when its 32-bit word is below this; p in [0, 1). p = 1 drops everything and needs no draw.
FASTATTN_FN uint32_t dropout_threshold(double p) {
  const double threshold = p * 4294967296.0;
  return threshold >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(threshold);
}

FASTATTN_FN bool dropout_keeps(uint64_t seed, uint64_t offset, int64_t bh, int64_t i, int64_t j, uint32_t threshold) {
  const PhiloxWords words = philox4x32(seed, static_cast<uint32_t>(j >> 2), static_cast<uint32_t>(i),
                                       static_cast<uint32_t>(bh), static_cast<uint32_t>(offset));
  return words.w[j & 3] >= threshold;
}

}  // namespace fastattn
