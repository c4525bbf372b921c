// Tiles of q, k, v and their like in shared memory: rows of kDim elements, cut into 16-byte chunks and swizzled, so
// that the eight rows that one ldmatrix phase reads at the same chunk lie in different banks.
//
// chunk c of row r is stored at place c ^ swizzle(r). Where rows are a multiple of 128 bytes the swizzle is r % 8; rows
// of an odd multiple of 64 bytes (16-bit heads of 32 and 96) already alternate between two halves of the banks, and
// (r / 2) % 4 does the rest. Swizzling flips bits of an address that a row's start leaves zero, so that walking along a
// row costs one XOR with a constant: see at().
#pragma once

#include "core/params.h"
#include "cuda/ptx.cuh"

namespace fastattn::cuda {

template <DType kType>
constexpr int kElementBytes = kType == DType::kFloat32 ? 4 : 2;

template <DType kType_, int kRows_, int kDim_, bool kSwizzled = true>
struct Tile {
  static constexpr DType kType = kType_;
  static constexpr int kRows = kRows_;
  static constexpr int kDim = kDim_;
  static constexpr int kRowBytes = kDim * kElementBytes<kType>;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kElementsPerChunk = 16 / kElementBytes<kType>;
  static_assert(kRowBytes % 64 == 0, "a row is whole halves of the 32 banks");
  static_assert(kBytes % 128 == 0, "tiles lie one after the other, and each starts with bank 0");

  static constexpr int kSwizzleMask = !kSwizzled ? 0 : kRowBytes % 128 == 0 ? 7 : 3;
  FASTATTN_DEVICE int swizzle(int row) { return (kRowBytes % 128 == 0 ? row : row >> 1) & kSwizzleMask; }

  // Of chunk 0 or 1 of a row, in a tile at `base`; at() goes on from there to chunks an even number further.
  FASTATTN_DEVICE SharedAddress address(SharedAddress base, int row, int chunk) {
    return base + static_cast<SharedAddress>(row * kRowBytes + ((chunk ^ swizzle(row)) << 4));
  }
  FASTATTN_DEVICE SharedAddress at(SharedAddress address, int even_chunks) {
    return (address ^ static_cast<SharedAddress>((even_chunks & kSwizzleMask) << 4)) +
           static_cast<SharedAddress>((even_chunks & ~kSwizzleMask) << 4);
  }
  FASTATTN_DEVICE SharedAddress chunk_address(SharedAddress base, int row, int chunk) {
    return base + static_cast<SharedAddress>(row * kRowBytes + ((chunk ^ swizzle(row)) << 4));
  }
};

// Computed anew wherever they are used: the kernels are short of registers, not of the instruction that this takes.
FASTATTN_DEVICE int lane_index() { return static_cast<int>(opaque(static_cast<uint32_t>(thread_index())) & 31u); }
FASTATTN_DEVICE int warp_index() { return static_cast<int>(opaque(static_cast<uint32_t>(thread_index())) >> 5); }

// What a lane hands to ldmatrix.x4 so that the four matrices it gets are operand fragments of mma. All count from
// (row 0, column 0) of the tile; whole multiples of 8 rows are added to the address, chunks by Tile::at().
//
// A operand, from row `first_row` on, 16 rows x 32 bytes: matrices (rows 0-7, chunk 0), (rows 8-15, chunk 0), (0-7, 1),
// (8-15, 1).
template <class Tile>
FASTATTN_DEVICE SharedAddress a_fragment_address(SharedAddress base, int first_row) {
  const int lane = lane_index();
  return Tile::address(base, lane & 15, lane >> 4) + static_cast<SharedAddress>(first_row * Tile::kRowBytes);
}
// B operand held as [n][k], two n-tiles of 8 rows x 32 bytes: (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1).
template <class Tile>
FASTATTN_DEVICE SharedAddress b_fragment_address(SharedAddress base) {
  const int lane = lane_index();
  return Tile::address(base, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// B operand held as [k][n], for ldmatrix.trans of 16-bit elements: 16 rows of k x two n-tiles of one chunk each.
// As four-byte elements, which ldmatrix cannot transpose, single words: rows 2t and 2t + 1, column g (see gemm.cuh).
template <class Tile>
FASTATTN_DEVICE SharedAddress bt_fragment_address(SharedAddress base) {
  const int lane = lane_index();
  if constexpr (Tile::kType == DType::kFloat32) {
    return Tile::address(base, 2 * (lane & 3), lane >> 4) + static_cast<SharedAddress>(((lane >> 2) & 3) * 4);
  } else {
    return Tile::address(base, lane & 15, lane >> 4);
  }
}

FASTATTN_DEVICE uint32_t load_element_bits(const void* row, int at, int bytes) {
  return bytes == 4 ? static_cast<const uint32_t*>(row)[at] : static_cast<const uint16_t*>(row)[at];
}

// Sixteen bytes of a row, element by element: `count` of them at most, zeros behind.
template <class Tile>
FASTATTN_DEVICE U32x4 gather_chunk(const char* src, int count) {
  constexpr int kSize = kElementBytes<Tile::kType>;
  U32x4 packed = {{0, 0, 0, 0}};
#pragma unroll
  for (int e = 0; e < Tile::kElementsPerChunk; ++e) {
    if (e < count) packed.x[e * kSize / 4] |= load_element_bits(src, e, kSize) << (e * kSize % 4 * 8);
  }
  return packed;
}

// Copies rows from global memory into a tile, by all threads of the CTA: `rows` of them, `dim` columns of each. What
// the tile has beyond becomes zero without being read: 0 times the NaN of a neighbour would be NaN.
// is_aligned: all rows start at multiples of 16 bytes. Then the copy is asynchronous (commit and wait for it), else
// done through registers: by the next sync_block() either way.
template <class Tile, int kThreads>
FASTATTN_DEVICE void load_tile(SharedAddress base, const char* first_row, int64_t row_bytes, int rows, int dim,
                               bool is_aligned) {
  constexpr int kSize = kElementBytes<Tile::kType>;
  constexpr int kWork = Tile::kRows * Tile::kChunks;
  constexpr int kPasses = (kWork + kThreads - 1) / kThreads;
  const int thread = static_cast<int>(opaque(static_cast<uint32_t>(thread_index())));
  if (is_aligned && kThreads % Tile::kChunks == 0) {
    // The same chunk of every kRowsPerPass-th row: two additions for each further copy.
    constexpr int kRowsPerPass = kThreads / Tile::kChunks;
    const int first = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const int left = dim * kSize - chunk * 16;
    const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
    const char* src = first_row + first * row_bytes + chunk * 16;
    [[maybe_unused]] constexpr int kUnroll = kPasses <= 8 ? kPasses : 4;
#pragma unroll kUnroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first + pass * kRowsPerPass;
      if (kWork % kThreads != 0 && row >= Tile::kRows) break;
      // With no byte to copy, the address is not looked at.
      cp_async_16(Tile::chunk_address(base, row, chunk), src, row < rows ? bytes : 0);
      src += kRowsPerPass * row_bytes;
    }
  } else if (is_aligned) {
#pragma unroll 4
    for (int pass = 0; pass < kPasses; ++pass) {
      const int work = pass * kThreads + thread;
      if (kWork % kThreads != 0 && work >= kWork) break;
      const int row = work / Tile::kChunks, chunk = work % Tile::kChunks;
      const int left = dim * kSize - chunk * 16;
      const int bytes = row >= rows || left < 0 ? 0 : left < 16 ? left : 16;
      cp_async_16(Tile::chunk_address(base, row, chunk), first_row + row * row_bytes + chunk * 16, bytes);
    }
  } else {
#pragma unroll 1
    for (int work = thread; work < kWork; work += kThreads) {
      const int row = work / Tile::kChunks, chunk = work % Tile::kChunks;
      const int count = row < rows ? dim - chunk * Tile::kElementsPerChunk : 0;
      store_shared_u32x4(Tile::chunk_address(base, row, chunk),
                         gather_chunk<Tile>(first_row + row * row_bytes + chunk * 16, count));
    }
  }
}

// The same for rows that lie anywhere: row_pointer(r) is where row r starts.
template <class Tile, int kThreads, class RowPointer>
FASTATTN_DEVICE void load_scattered_tile(SharedAddress base, RowPointer row_pointer, int rows, int dim,
                                         bool is_aligned) {
  constexpr int kSize = kElementBytes<Tile::kType>;
#pragma unroll 1
  for (int work = thread_index(); work < Tile::kRows * Tile::kChunks; work += kThreads) {
    const int row = work / Tile::kChunks, chunk = work % Tile::kChunks;
    const char* src = row_pointer(row < rows ? row : 0) + chunk * 16;
    const int count = row < rows ? dim - chunk * Tile::kElementsPerChunk : 0;
    if (is_aligned) {
      cp_async_16(Tile::chunk_address(base, row, chunk), src,
                  count < 0                         ? 0
                  : count < Tile::kElementsPerChunk ? count * kSize
                                                    : 16);
    } else {
      store_shared_u32x4(Tile::chunk_address(base, row, chunk), gather_chunk<Tile>(src, count));
    }
  }
}

// Copies rows [first_row, first_row + kRows) of a tile, as far as there are `rows`, to global memory: `dim` columns of
// each, by one warp. row_pointer(r) is where row r of the tile goes.
template <class Tile, int kRows, class RowPointer>
FASTATTN_DEVICE void store_rows(SharedAddress base, RowPointer row_pointer, int first_row, int rows, int dim,
                                bool is_aligned) {
  constexpr int kSize = kElementBytes<Tile::kType>;
  for (int work = lane_index(); work < kRows * Tile::kChunks; work += 32) {
    const int row = first_row + work / Tile::kChunks, chunk = work % Tile::kChunks;
    const int first = chunk * Tile::kElementsPerChunk;
    if (row >= rows || first >= dim) continue;
    const U32x4 packed = load_shared_u32x4(Tile::chunk_address(base, row, chunk));
    char* dst = static_cast<char*>(row_pointer(row)) + chunk * 16;
    if (is_aligned && first + Tile::kElementsPerChunk <= dim) {
      store_global_u32x4(dst, packed);
    } else {
#pragma unroll
      for (int e = 0; e < Tile::kElementsPerChunk; ++e) {
        if (first + e >= dim) break;
        if constexpr (kSize == 4) {
          reinterpret_cast<uint32_t*>(dst)[e] = packed.x[e];
        } else {
          reinterpret_cast<uint16_t*>(dst)[e] = static_cast<uint16_t>(packed.x[e / 2] >> (e % 2 * 16));
        }
      }
    }
  }
}

}  // namespace fastattn::cuda
