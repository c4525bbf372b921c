// Philox4x32-10 against the known answers that its authors publish with Random123, and what dropout makes of it.
#include "core/philox.h"

#include <cmath>
#include <initializer_list>

#include "testing/check.h"

namespace {

using fastattn::PhiloxWords;

void check_known_answers() {
  struct {
    uint32_t counter[4], key[2], words[4];
  } const answers[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& a : answers) {
    const uint64_t seed = a.key[0] | static_cast<uint64_t>(a.key[1]) << 32;
    const PhiloxWords words = fastattn::philox4x32(seed, a.counter[0], a.counter[1], a.counter[2], a.counter[3]);
    for (int n = 0; n < 4; ++n) CHECK(words.w[n] == a.words[n], "word %d: %08x, not %08x", n, words.w[n], a.words[n]);
  }
}

void check_threshold() {
  using fastattn::dropout_threshold;
  CHECK(dropout_threshold(0.0) == 0, "%u", dropout_threshold(0.0));
  CHECK(dropout_threshold(0.5) == 1u << 31, "%u", dropout_threshold(0.5));
  CHECK(dropout_threshold(0.25) == 1u << 30, "%u", dropout_threshold(0.25));
  CHECK(dropout_threshold(std::nextafter(1.0, 0.0)) == 0xffffffffu, "%u", dropout_threshold(std::nextafter(1.0, 0.0)));
}

// Word j % 4 of the counter {j / 4, i, bh, offset}: the layout that every backend has to follow.
void check_layout() {
  const uint64_t seed = 0x0123456789abcdefull, offset = 77;
  const uint32_t threshold = fastattn::dropout_threshold(0.3);
  for (int64_t bh = 0; bh < 3; ++bh) {
    for (int64_t i = 0; i < 5; ++i) {
      for (int64_t j = 0; j < 41; ++j) {
        const PhiloxWords words = fastattn::philox4x32(seed, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i),
                                                       static_cast<uint32_t>(bh), static_cast<uint32_t>(offset));
        const bool kept = fastattn::dropout_keeps(seed, offset, bh, i, j, threshold);
        CHECK(kept == (words.w[j % 4] >= threshold), "bh=%d i=%d j=%d", int(bh), int(i), int(j));
      }
    }
  }
}

// The number kept among n draws has the standard deviation sqrt(n p (1 - p)). Seed, offset, head, row and key are
// varied one at a time: a generator that ignored one of them would keep all or nothing.
void check_frequencies() {
  constexpr int64_t n = 40000;
  for (const double p : {0.1, 0.5, 0.9}) {
    const uint32_t threshold = fastattn::dropout_threshold(p);
    for (int varied = 0; varied < 5; ++varied) {
      int64_t kept = 0;
      for (int64_t at = 0; at < n; ++at) {
        const auto pick = [&](int which, int64_t otherwise) { return varied == which ? at : otherwise; };
        kept += fastattn::dropout_keeps(static_cast<uint64_t>(pick(0, 11)), static_cast<uint64_t>(pick(1, 12)),
                                        pick(2, 13), pick(3, 14), pick(4, 15), threshold);
      }
      const double deviation = std::abs(static_cast<double>(kept) - n * (1.0 - p)) / std::sqrt(n * p * (1.0 - p));
      CHECK(deviation < 5.0, "p=%g, argument %d varied: %ld of %ld kept", p, varied, long(kept), long(n));
    }
  }
}

}  // namespace

int main() {
  check_known_answers();
  check_threshold();
  check_layout();
  check_frequencies();
  return fastattn::testing::report("philox_test");
}
