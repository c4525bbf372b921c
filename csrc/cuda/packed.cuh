// What the kernels of packed sequences leave alone: rows and keys of no sequence, before the first, after the last, or
// beyond what the longest may have. They count as rows that see no key, and keys that no row sees.
//
// One warp = kRowsPerWarp rows. Nearly all of them are of some sequence, and need no more than to find that out.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/score.cuh"

namespace fastattn::cuda {

struct PackedTensor {
  void* data = nullptr;                   // [rows, heads, bytes]; null: nothing to do
  int64_t head_bytes = 0, row_bytes = 0;  // from one to the next
  int64_t heads = 0, bytes = 0;
};

struct UncoveredParams {
  AttentionParams attention;
  PackedTensor of_rows, of_keys[2];  // become 0
  float* minus_infinity[2] = {};     // [copies, Hq, packed_rows], become -inf
  float* zero = nullptr;             // the same, become 0
  int copies = 1;
};

struct UncoveredKernel {
  using Params = UncoveredParams;
  static constexpr const char* kName = "attention_uncovered";
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr int kRowsPerWarp = 8, kRowsPerBlock = kThreads / 32 * kRowsPerWarp;

  FASTATTN_DEVICE void run(const Params& p) {
    const AttentionParams& a = p.attention;
    const int64_t first = block_index() * kRowsPerBlock + (thread_index() >> 5) * kRowsPerWarp;
#pragma unroll 1
    for (int64_t row = first; row < first + kRowsPerWarp; ++row) {
      if (p.of_rows.data != nullptr || p.zero != nullptr) {
        if (row < a.packed_rows && !is_covered(a, row, false)) clear_row(p, row);
      }
      if (p.of_keys[0].data != nullptr && row < a.packed_keys && !is_covered(a, row, true)) {
        clear(p.of_keys[0], row);
        clear(p.of_keys[1], row);
      }
    }
  }

  // Whether row (or key) n is of a sequence: of the last one that does not begin after it.
  FASTATTN_DEVICE bool is_covered(const AttentionParams& a, int64_t n, bool is_key) {
    if (a.B == 0) return false;
    const int32_t* const starts = is_key ? a.cu_seqlens_k : a.cu_seqlens_q;
    int64_t low = 0, end = a.B;
    while (end - low > 1) {
      const int64_t middle = (low + end) / 2;
      if (starts[middle] <= n) {
        low = middle;
      } else {
        end = middle;
      }
    }
    const PackedSequence s = packed_sequence(a, low);
    const int64_t begin = is_key ? s.first_key : s.first_row;
    return begin <= n && n < begin + (is_key ? s.keys : s.rows);
  }

  FASTATTN_DEVICE void clear_row(const Params& p, int64_t row) {
    clear(p.of_rows, row);
    const AttentionParams& a = p.attention;
    for (int64_t n = thread_index() & 31; n < p.copies * a.Hq; n += 32) {
      const int64_t at = n * a.packed_rows + row;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (p.minus_infinity[i] != nullptr) p.minus_infinity[i][at] = -kInfinity;
      }
      if (p.zero != nullptr) p.zero[at] = 0.0f;
    }
  }

  // Elements are two bytes or four, and rows need not start at more than that.
  FASTATTN_DEVICE void clear(const PackedTensor& t, int64_t row) {
    if (t.data == nullptr) return;
    for (int64_t h = 0; h < t.heads; ++h) {
      char* const out = static_cast<char*>(t.data) + h * t.head_bytes + row * t.row_bytes;
      for (int64_t at = 2 * (thread_index() & 31); at < t.bytes; at += 64) *reinterpret_cast<uint16_t*>(out + at) = 0;
    }
  }
};

}  // namespace fastattn::cuda
