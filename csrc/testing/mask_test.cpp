// Mask geometry on every small shape: ranges and tile kinds of core/mask.h against the definition of what is visible,
// which is spelled out here once more, from the documentation of the masks and not from lo and hi.
#include "core/mask.h"

#include <initializer_list>

#include "testing/check.h"

namespace {

using fastattn::AttentionParams;
using fastattn::Causal;
using fastattn::MaskGeometry;
using fastattn::TileKind;
using fastattn::TileRange;

constexpr int64_t kMaxLength = 7;
constexpr int64_t kMaxTile = 4;

struct Shape {
  int64_t Lq, Lk, kv_length;
  Causal causal;
  int64_t left, right;
};

#define SHAPE_FORMAT "Lq=%d Lk=%d kv_length=%d causal=%d window=(%d, %d) "
#define SHAPE_VALUES(s)                                                                                              \
  static_cast<int>((s).Lq), static_cast<int>((s).Lk), static_cast<int>((s).kv_length), static_cast<int>((s).causal), \
      static_cast<int>((s).left), static_cast<int>((s).right)

bool is_visible(const Shape& s, int64_t i, int64_t j) {
  if (j >= s.kv_length) return false;
  const int64_t diagonal = s.causal == Causal::kTopLeft ? i : i + s.kv_length - s.Lq;
  if (s.causal != Causal::kNone && j > diagonal) return false;
  if (s.left != fastattn::kUnlimited && j < diagonal - s.left) return false;
  if (s.right != fastattn::kUnlimited && j > diagonal + s.right) return false;
  return true;
}

// What is visible in a block, found by looking at every pair. any: the keys (or rows) that something sees; all: those
// that everything sees. Both are contiguous: that is checked too.
struct Found {
  int64_t any_begin = 0, any_end = 0, any_count = 0;
  int64_t all_begin = 0, all_end = 0, all_count = 0;

  void add(int64_t at, bool any, bool all) {
    if (any) {
      if (any_count++ == 0) any_begin = at;
      any_end = at + 1;
    }
    if (all) {
      if (all_count++ == 0) all_begin = at;
      all_end = at + 1;
    }
  }
};

bool matches(const TileRange& range, const Found& found) {
  const bool any =
      found.any_count == 0 ? range.begin >= range.end : range.begin == found.any_begin && range.end == found.any_end;
  const bool all = found.all_count == 0 ? range.full_begin >= range.full_end
                                        : range.full_begin == found.all_begin && range.full_end == found.all_end;
  return any && all && found.any_end - found.any_begin == found.any_count &&
         found.all_end - found.all_begin == found.all_count;
}

// Under every boolean mask of row i; visible: the keys that its geometry leaves it.
void check_first_visible(AttentionParams p, const MaskGeometry& g, const bool (&visible)[kMaxLength], int64_t i) {
  uint8_t mask[kMaxLength];
  p.mask = mask;
  p.mask_stride[3] = 1;
  for (unsigned kept = 0; kept < 1u << p.Lk; ++kept) {
    int64_t first = -1;
    for (int64_t j = p.Lk - 1; j >= 0; --j) {
      mask[j] = kept >> j & 1;
      if (visible[j] && mask[j]) first = j;
    }
    if (first < 0) continue;
    CHECK(first_visible_key(p, g, 0, 0, i) == first, "row %d, mask %x: not %d", int(i), kept, int(first));
  }
}

void check_shape(const Shape& s) {
  const int32_t kv_length = static_cast<int32_t>(s.kv_length);
  AttentionParams p;
  p.B = p.Hq = p.Hkv = 1;
  p.Lq = s.Lq;
  p.Lk = s.Lk;
  p.causal = s.causal;
  p.window_left = s.left;
  p.window_right = s.right;
  // The full length is given both ways: as no kv_lengths at all (when odd) and as kv_lengths.
  p.kv_lengths = s.kv_length == s.Lk && (s.Lq + s.Lk) % 2 == 1 ? nullptr : &kv_length;
  const MaskGeometry g = mask_geometry(p, 0);

  bool visible[kMaxLength][kMaxLength] = {};
  int64_t pairs = 0;
  for (int64_t i = 0; i < s.Lq; ++i) {
    for (int64_t j = 0; j < s.Lk; ++j) {
      visible[i][j] = is_visible(s, i, j);
      pairs += visible[i][j];
      CHECK(keep(g, i, j) == visible[i][j], SHAPE_FORMAT "i=%d j=%d", SHAPE_VALUES(s), int(i), int(j));
    }
    CHECK(0 <= lo(g, i) && hi(g, i) <= s.kv_length, SHAPE_FORMAT "i=%d", SHAPE_VALUES(s), int(i));
    if (i > 0) {
      CHECK(lo(g, i - 1) <= lo(g, i) && hi(g, i - 1) <= hi(g, i), SHAPE_FORMAT "i=%d", SHAPE_VALUES(s), int(i));
    }
  }
  for (int64_t i = 0; i < s.Lq; ++i) check_first_visible(p, g, visible[i], i);
  CHECK(visible_pairs(g) == pairs, SHAPE_FORMAT "%d", SHAPE_VALUES(s), int(pairs));

  for (int64_t i0 = 0; i0 < s.Lq; ++i0) {
    for (int64_t i1 = i0 + 1; i1 <= fastattn::min_i64(i0 + kMaxTile, s.Lq); ++i1) {
      Found keys;
      for (int64_t j = 0; j < s.kv_length; ++j) {
        bool any = false, all = true;
        for (int64_t i = i0; i < i1; ++i) {
          any |= visible[i][j];
          all &= visible[i][j];
        }
        keys.add(j, any, all);
      }
      CHECK(matches(key_range(g, i0, i1), keys), SHAPE_FORMAT "rows [%d, %d)", SHAPE_VALUES(s), int(i0), int(i1));

      for (int64_t j0 = 0; j0 < s.kv_length; ++j0) {
        for (int64_t j1 = j0 + 1; j1 <= fastattn::min_i64(j0 + kMaxTile, s.kv_length); ++j1) {
          bool any = false, all = true;
          for (int64_t i = i0; i < i1; ++i) {
            for (int64_t j = j0; j < j1; ++j) {
              any |= visible[i][j];
              all &= visible[i][j];
            }
          }
          const TileKind kind = all ? TileKind::kFull : any ? TileKind::kPartial : TileKind::kSkip;
          CHECK(classify_tile(g, i0, i1, j0, j1) == kind, SHAPE_FORMAT "rows [%d, %d) keys [%d, %d)", SHAPE_VALUES(s),
                int(i0), int(i1), int(j0), int(j1));
        }
      }
    }
  }

  for (int64_t j0 = 0; j0 < s.kv_length; ++j0) {
    for (int64_t j1 = j0 + 1; j1 <= fastattn::min_i64(j0 + kMaxTile, s.kv_length); ++j1) {
      Found rows;
      for (int64_t i = 0; i < s.Lq; ++i) {
        bool any = false, all = true;
        for (int64_t j = j0; j < j1; ++j) {
          any |= visible[i][j];
          all &= visible[i][j];
        }
        rows.add(i, any, all);
      }
      CHECK(matches(row_range(g, j0, j1), rows), SHAPE_FORMAT "keys [%d, %d)", SHAPE_VALUES(s), int(j0), int(j1));
    }
  }
}

// A window as wide as an integer goes is an unlimited one: no sum of it with a position may overflow.
void check_huge_windows() {
  for (const Causal causal : {Causal::kNone, Causal::kTopLeft, Causal::kBottomRight}) {
    for (const int64_t length : {int64_t{5}, int64_t{1} << 31, int64_t{1} << 40}) {
      AttentionParams p;
      p.Lq = length;
      p.Lk = length / 2 + 3;
      p.causal = causal;
      const MaskGeometry unlimited = mask_geometry(p, 0);
      p.window_left = p.window_right = INT64_MAX;
      const MaskGeometry huge = mask_geometry(p, 0);
      for (const int64_t i : {int64_t{0}, length / 3, length - 1}) {
        CHECK(lo(huge, i) == lo(unlimited, i) && hi(huge, i) == hi(unlimited, i), "row %ld", long(i));
      }
      const TileRange a = row_range(huge, p.Lk / 2, p.Lk), b = row_range(unlimited, p.Lk / 2, p.Lk);
      CHECK(a.begin == b.begin && a.end == b.end, "[%ld, %ld)", long(a.begin), long(a.end));
    }
  }
}

}  // namespace

int main() {
  for (int64_t Lq = 0; Lq <= kMaxLength; ++Lq) {
    for (int64_t Lk = 0; Lk <= kMaxLength; ++Lk) {
      for (int64_t kv_length = 0; kv_length <= Lk; ++kv_length) {
        for (const Causal causal : {Causal::kNone, Causal::kTopLeft, Causal::kBottomRight}) {
          for (int64_t left = fastattn::kUnlimited; left <= 8; ++left) {
            for (int64_t right = fastattn::kUnlimited; right <= 8; ++right) {
              check_shape({Lq, Lk, kv_length, causal, left, right});
            }
          }
        }
      }
    }
  }
  check_huge_windows();
  return fastattn::testing::report("mask_test");
}
