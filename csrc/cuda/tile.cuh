// Tiles of q, k, v and their like in shared memory: rows of kDim elements, cut into 16-byte chunks and swizzled, so that
// the eight rows that one ldmatrix phase reads at the same chunk lie in different banks.
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

// What a lane hands to ldmatrix.x4 so that the four matrices it gets are operand fragments of mma. All count from
// (row 0, column 0) of the tile; whole multiples of 8 rows are added to the address, chunks by Tile::at().
//
// A operand, 16 rows x 32 bytes: matrices (rows 0-7, chunk 0), (rows 8-15, chunk 0), (0-7, 1), (8-15, 1).
template <class Tile>
FASTATTN_DEVICE SharedAddress a_fragment_address(SharedAddress base, int lane) {
  return Tile::address(base, lane & 15, lane >> 4);
}
// B operand held as [n][k], two n-tiles of 8 rows x 32 bytes: (rows 0-7, chunk 0), (0-7, 1), (8-15, 0), (8-15, 1).
template <class Tile>
FASTATTN_DEVICE SharedAddress b_fragment_address(SharedAddress base, int lane) {
  return Tile::address(base, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
// B operand held as [k][n], for ldmatrix.trans of 16-bit elements: 16 rows of k x two n-tiles of one chunk each.
// As four-byte elements, which ldmatrix cannot transpose, single words: rows 2t and 2t + 1, column g (see gemm.cuh).
template <class Tile>
FASTATTN_DEVICE SharedAddress bt_fragment_address(SharedAddress base, int lane) {
  if constexpr (Tile::kType == DType::kFloat32) {
    return Tile::address(base, 2 * (lane & 3), lane >> 4) + static_cast<SharedAddress>(((lane >> 2) & 3) * 4);
  } else {
    return Tile::address(base, lane & 15, lane >> 4);
  }
}

FASTATTN_DEVICE uint32_t load_element_bits(const void* row, int at, int bytes) {
  return bytes == 4 ? static_cast<const uint32_t*>(row)[at] : static_cast<const uint16_t*>(row)[at];
}

// Copies rows from global memory into a tile, by all threads of the CTA. row_pointer(r) is where row r starts; rows from
// `rows` on and columns from `dim` on become zero without being read: 0 times the NaN of a neighbour would be NaN.
// is_aligned: all rows start at multiples of 16 bytes. Then the copy is asynchronous (commit and wait for it), else done
// through registers: by the next sync_block() either way.
template <class Tile, int kThreads, class RowPointer>
FASTATTN_DEVICE void load_tile(SharedAddress base, RowPointer row_pointer, int rows, int dim, bool is_aligned) {
  constexpr int kWork = Tile::kRows * Tile::kChunks;
  constexpr int kPasses = (kWork + kThreads - 1) / kThreads;
  constexpr int kSize = kElementBytes<Tile::kType>;
  const int thread = static_cast<int>(opaque(static_cast<uint32_t>(thread_index())));
  if (is_aligned) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int work = pass * kThreads + thread;
      if (kWork % kThreads != 0 && work >= kWork) break;
      const int row = work / Tile::kChunks, chunk = work % Tile::kChunks;
      const int left = dim * kSize - chunk * 16;
      const int bytes = row < rows && left > 0 ? (left < 16 ? left : 16) : 0;
      const char* src = static_cast<const char*>(row_pointer(bytes > 0 ? row : 0)) + (bytes > 0 ? chunk * 16 : 0);
      cp_async_16(Tile::chunk_address(base, row, chunk), src, bytes);
    }
  } else {
    for (int work = thread; work < kWork; work += kThreads) {
      const int row = work / Tile::kChunks, chunk = work % Tile::kChunks;
      U32x4 packed = {{0, 0, 0, 0}};
      if (row < rows) {
        const void* src = row_pointer(row);
        const int first = chunk * Tile::kElementsPerChunk;
#pragma unroll
        for (int e = 0; e < Tile::kElementsPerChunk; ++e) {
          if (first + e < dim) packed.x[e * kSize / 4] |= load_element_bits(src, first + e, kSize) << (e * kSize % 4 * 8);
        }
      }
      store_shared_u32x4(Tile::chunk_address(base, row, chunk), packed);
    }
  }
}

// Copies `rows` rows of a tile, `dim` columns of each, to global memory, by `threads` threads that count from `thread`.
// Rows [first_row, first_row + kRows) of the tile.
template <class Tile, int kRows, int kThreads, class RowPointer>
FASTATTN_DEVICE void store_tile(SharedAddress base, int thread, RowPointer row_pointer, int first_row, int rows, int dim,
                                bool is_aligned) {
  constexpr int kSize = kElementBytes<Tile::kType>;
  for (int work = thread; work < kRows * Tile::kChunks; work += kThreads) {
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
