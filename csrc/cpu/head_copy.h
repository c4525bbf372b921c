// A worker's copy of one head's keys and values, in the form that the operands read (operands.h).
//
// Where workers are few, one that computed a block of rows soon gets another block of that head, and finds the tiles
// that it packed before.
//
// The copy holds one interval of keys, which grows with the tiles that are asked for: upwards within a block of rows,
// and downwards from block to block where a window moves along.
#pragma once

#include "cpu/cached_rows.h"
#include "cpu/operands.h"
#include "cpu/tile.h"

namespace fastattn::cpu::FASTATTN_ISA {
namespace {

template <class Operands>
class HeadCopy {
  using Element = typename Operands::Element;
  using Raw = typename Operands::Raw;

 public:
  // What a worker needs of memory, whose first kHeadCopyState bytes are 0 when a call begins, where `uses` of its items
  // read the same keys; 0: nothing is worth copying, or it is too much.
  static size_t bytes(const AttentionParams& p, int64_t uses) {
    constexpr size_t kMost = size_t{8} << 20;
    // What is packed for each tile anyway pays the second time. What could be read in place, 2 blocks of 197 rows for
    // each of two workers, lost 5%, 4 of 512 rows 2%, and 16 of 2048 rows gained 5% (float32, D=64, 64 and 128).
    const bool must_pack = is_cache(p) || !Operands::rows_are_in_place(p.D) || !Operands::columns_are_in_place(p.Dv);
    if (p.w != nullptr || uses < (must_pack ? 2 : 8) || !(copies_keys(p) || copies_values(p))) return 0;
    int64_t keys = 0;  // of the longest sequence: a cache may have room for many more
    for (int64_t b = 0; b < p.B; ++b) keys = max_i64(keys, mask_geometry(p, b).Lk);
    const size_t bytes =
        sizeof(float) * static_cast<size_t>(key_floats(p, keys) + value_floats(p, keys)) + kHeadCopyState;
    return bytes <= kMost ? bytes : 0;
  }

  // Of the item's head. k_rows and v_rows: scratch for rows of a cache.
  HeadCopy(const AttentionParams& p, const ForwardItem& item, void* k_rows, void* v_rows)
      : p_(p),
        state_(static_cast<State*>(item.head_copy)),
        k_rows_(static_cast<Raw*>(k_rows)),
        v_rows_(static_cast<Raw*>(v_rows)) {
    if (state_ == nullptr) return;
    k_ = reinterpret_cast<float*>(static_cast<char*>(item.head_copy) + kHeadCopyState);
    v_ = k_ + key_floats(p, mask_geometry(p, item.b).Lk);
    const int64_t hkv = item.hq / (p.Hq / p.Hkv);
    if (state_->p != &p || state_->b != item.b || state_->hkv != hkv) *state_ = {&p, item.b, hkv, 0, 0};
  }

  // Says whether the tile's keys and values can be had from here, and sees to it that they are.
  bool take(const Tile& tile) {
    holds_tile_ = false;
    // Pairs of keys begin at even ones; the products read at least kRowPad rows.
    if (state_ == nullptr || tile.j0 % kRowsOfV != 0 || tile.nk < kRowPad) return false;
    const int64_t end = tile.j0 + tile.nk;
    if (tile.j0 > state_->end || end < state_->begin) state_->begin = state_->end = tile.j0;
    if (tile.j0 < state_->begin) {
      // All of the tile, and the other half of a pair that is here already.
      const int64_t last = max_i64(end, min_i64(state_->end, round_up(end, kRowsOfV)));
      copy(tile.j0, last);
      state_->begin = tile.j0;
      state_->end = max_i64(state_->end, last);
    } else if (end > state_->end) {
      copy(state_->end / kRowsOfV * kRowsOfV, end);
      state_->end = end;
    }
    // An odd last key is paired with zeros, unless a longer tile has come before.
    holds_tile_ = end % kRowsOfV == 0 || end == state_->end;
    return holds_tile_;
  }
  bool holds_tile() const { return holds_tile_; }

  // Of the tile that was taken.
  Operand keys(const Tile& tile) const {
    if (!copies_keys(p_)) {
      return {reinterpret_cast<const char*>(row_at<const Raw>(p_.k, p_.k_stride, tile.b, state_->hkv, tile.j0)),
              p_.k_stride[2] * static_cast<int64_t>(sizeof(Raw))};
    }
    return {reinterpret_cast<const char*>(k_ + tile.j0 * key_row_floats(p_)), key_row_floats(p_) * 4};
  }
  Operand values(const Tile& tile) const {
    if (!copies_values(p_)) {
      return {reinterpret_cast<const char*>(row_at<const Raw>(p_.v, p_.v_stride, tile.b, state_->hkv, tile.j0)),
              p_.v_stride[2] * static_cast<int64_t>(sizeof(Raw))};
    }
    return {reinterpret_cast<const char*>(v_ + tile.j0 / kRowsOfV * value_row_floats(p_)), value_row_floats(p_) * 4};
  }

 private:
  struct State {
    const AttentionParams* p;
    int64_t b, hkv, begin, end;  // has the keys [begin, end), begin a multiple of kRowsOfV
  };
  static_assert(sizeof(State) <= kHeadCopyState);

  static constexpr int64_t kRowsOfV = Operands::kPairs ? 2 : 1;  // in a row of the copy

  static bool is_cache(const AttentionParams& p) { return p.block_table != nullptr || p.k_scale != nullptr; }
  // Rows with those of other heads between them are mostly a multiple of 1 KB or more apart, and fall into few sets of
  // the caches.
  static bool copies_keys(const AttentionParams& p) {
    return is_cache(p) || p.k_stride[2] >= 2 * p.D || !Operands::rows_are_in_place(p.D);
  }
  static bool copies_values(const AttentionParams& p) {
    return is_cache(p) || p.v_stride[2] >= 2 * p.Dv || !Operands::columns_are_in_place(p.Dv);
  }
  static int64_t key_row_floats(const AttentionParams& p) { return Operands::units(Operands::padded(p.D)); }
  static int64_t value_row_floats(const AttentionParams& p) { return Operands::padded(p.Dv); }
  // Copies are padded to kRowPad rows.
  static int64_t key_floats(const AttentionParams& p, int64_t keys) {
    return copies_keys(p) ? round_up(keys + kRowPad, 16) * key_row_floats(p) : 0;
  }
  static int64_t value_floats(const AttentionParams& p, int64_t keys) {
    return copies_values(p) ? round_up(keys + kRowPad, 16) / kRowsOfV * value_row_floats(p) : 0;
  }

  // At most as many keys as a tile has.
  void copy(int64_t j0, int64_t j1) {
    if (copies_keys(p_)) {
      const auto rows = cached_rows<Element>(p_, cached_keys(p_), state_->b, state_->hkv, j0, j1 - j0, k_rows_);
      Operands::copied_rows(k_ + j0 * key_row_floats(p_), rows.data, rows.stride, j1 - j0, p_.D);
    }
    if (copies_values(p_)) {
      const auto rows = cached_rows<Element>(p_, cached_values(p_), state_->b, state_->hkv, j0, j1 - j0, v_rows_);
      Operands::copied_columns(v_ + j0 / kRowsOfV * value_row_floats(p_), rows.data, rows.stride, j1 - j0, p_.Dv);
    }
  }

  const AttentionParams& p_;
  State* state_;
  Raw *k_rows_, *v_rows_;
  float *k_ = nullptr, *v_ = nullptr;
  bool holds_tile_ = false;
};

}  // namespace
}  // namespace fastattn::cpu::FASTATTN_ISA
