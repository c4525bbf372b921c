// Where rows are: pointers into [B, H, L, D] tensors, the query rows that a tile of the forward pass stands for, and
// the tiles of keys that they walk over.
#pragma once

#include "core/sequence.h"
#include "cuda/ptx.cuh"

namespace fastattn::cuda {

// Rows of one (batch, head) of a tensor; kBytes is the size of an element.
template <int kBytes>
struct RowPointer {
  const char* base;
  int64_t row_bytes;

  FASTATTN_DEVICE RowPointer make(const void* tensor, const int64_t (&stride)[3], int64_t b, int64_t h) {
    return {static_cast<const char*>(tensor) + (b * stride[0] + h * stride[1]) * kBytes, stride[2] * kBytes};
  }
  FASTATTN_ALWAYS_INLINE const char* at(int64_t row) const { return base + row * row_bytes; }
};

// Where the rows and keys of sequence b begin among those of all, and how many it has: of packed sequences their own,
// else all that the tensors have for it. Batch strides are 0 where sequences are packed (engine.cuh), so that one
// formula finds rows of both. Read anew wherever it is needed: kept, it would take registers throughout a loop.
FASTATTN_DEVICE PackedSequence sequence_rows(const AttentionParams& p, int b) {
  if (p.cu_seqlens_q == nullptr) return {0, p.Lq, 0, p.Lk};
  return packed_sequence(p, static_cast<int>(opaque(static_cast<uint32_t>(b))));
}

// The geometry of sequence b, packed or not, computed anew as well.
FASTATTN_DEVICE MaskGeometry sequence_geometry(const AttentionParams& p, int b) {
  const int again = static_cast<int>(opaque(static_cast<uint32_t>(b)));
  if (p.cu_seqlens_q == nullptr) return mask_geometry(p, again);
  const PackedSequence own = packed_sequence(p, again);
  return mask_geometry(p, own.rows, own.keys);
}

// Where the statistics of sequence b and head h begin: [B, Hq, Lq], or of packed sequences [Hq, packed_rows].
struct StatStrides {
  int64_t batch = 0, head = 0;

  FASTATTN_ALWAYS_INLINE int64_t at(int b, int h, int64_t first_row) const { return b * batch + h * head + first_row; }
};
inline StatStrides stat_strides(const AttentionParams& p) {
  if (p.cu_seqlens_q != nullptr) return {0, p.packed_rows};
  return {p.Hq * p.Lq, p.Lq};
}

// For kernels to which a row is a row, whosever it is: packed sequences are one sequence to them.
inline AttentionParams as_one_sequence(AttentionParams p) {
  if (p.cu_seqlens_q == nullptr) return p;
  p.B = 1;
  p.Lq = p.packed_rows;
  p.cu_seqlens_q = p.cu_seqlens_k = nullptr;
  return p;
}
inline int64_t all_rows(const AttentionParams& p) {
  const AttentionParams one = as_one_sequence(p);
  return one.B * one.Hq * one.Lq;
}

// A row of a tile in the forward pass: query i of head h. Where few queries meet many keys, the heads that share their
// keys become rows of one tile ("packed": row r is query r / heads of head first_head + r % heads), which then reads
// those keys once. Otherwise heads = 1.
struct QueryRows {
  int first_head;
  int heads;

  FASTATTN_ALWAYS_INLINE int query(int r) const { return heads == 1 ? r : r / heads; }
  FASTATTN_ALWAYS_INLINE int head(int r) const { return heads == 1 ? first_head : first_head + r % heads; }
};

// The tiles of kBlockN keys [begin, end) that one part of the keys has, where a tile of rows sees `keys` and they are
// split into `splits` parts. The last parts may have none.
struct KeyTiles {
  int begin, end;
};
template <int kBlockN>
FASTATTN_DEVICE KeyTiles tiles_of_split(const TileRange& keys, int split, int splits) {
  const int first = static_cast<int>(keys.begin / kBlockN);
  const int last = keys.end > keys.begin ? static_cast<int>((keys.end + kBlockN - 1) / kBlockN) : first;
  const int tiles_per_split = (last - first + splits - 1) / splits;
  const int begin = first + split * tiles_per_split;
  return {begin, last < begin + tiles_per_split ? last : begin + tiles_per_split};
}

// Whether every row of the tensor starts at a multiple of 16 bytes: what the asynchronous copies need.
inline bool rows_are_aligned(const void* tensor, const int64_t (&stride)[3], int64_t element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  for (const int64_t s : stride) aligned = aligned && s * element_bytes % 16 == 0;
  return aligned;
}

}  // namespace fastattn::cuda
