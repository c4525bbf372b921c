// Tiles of keys and values out of a cache whose rows are no plain array: in pages, as int8 with a scale for each row,
// or both. Every row is looked up by itself, so that pages may have any size; where whole tiles lie in one page, one
// lookup serves a tile, and the copy is the ordinary one.
//
// Rows as they are go to shared memory by asynchronous copies. int8 rows go through registers, where they are
// multiplied by their scales and rounded to the kernel's type: the matrix instructions get what they get of any cache.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/rows.cuh"

namespace fastattn::cuda {

// k or v of a cache.
struct CacheTensor {
  const void* data;       // [B or pages, Hkv, rows, dim]
  const int64_t* stride;  // batch or page, head, row
  const float* scale;     // [B or pages, Hkv, rows], of int8 rows; null: rows of the kernel's type
  const int64_t* scale_stride;
};

// Whether the keys of a sequence are rows one after the other, of the kernel's type.
inline bool has_plain_rows(const AttentionParams& p) { return p.block_table == nullptr && p.k_scale == nullptr; }

// Where key j of sequence b lies. Entries of the table that lead out of the cache count as the nearest that do not: on
// a GPU nobody can check them without waiting for the device.
struct CachePlace {
  int64_t batch;  // or page
  int row;
};
FASTATTN_DEVICE CachePlace cache_place(const AttentionParams& p, int b, int j) {
  if (p.block_table == nullptr) return {b, j};
  const uint32_t page_size = static_cast<uint32_t>(p.page_size), page = static_cast<uint32_t>(j) / page_size;
  const int64_t entry = p.block_table[b * p.block_table_stride + page];
  return {clamp_i64(entry, 0, p.pages - 1), j - static_cast<int>(page * page_size)};
}

// Eight bytes of a row of int8, or four where `bytes` is 4; `count` of them at most, zeros behind. is_aligned: the row
// starts at a multiple of eight bytes.
FASTATTN_DEVICE U32x2 load_numbers(const char* src, int bytes, int count, bool is_aligned) {
  if (is_aligned && count >= bytes) {
    if (bytes == 8) return load_global_u32x2(src);
    return {{*reinterpret_cast<const uint32_t*>(src), 0}};
  }
  uint64_t numbers = 0;
#pragma unroll 1
  for (int e = 0; e < count && e < bytes; ++e)
    numbers |= static_cast<uint64_t>(static_cast<uint8_t>(src[e])) << (8 * e);
  return {{static_cast<uint32_t>(numbers), static_cast<uint32_t>(numbers >> 32)}};
}

FASTATTN_DEVICE float dequantised(uint32_t numbers, int at, float scale) {
  return multiply(static_cast<float>(static_cast<int8_t>(numbers >> (8 * at))), scale);
}

// Sixteen bytes of a tile. A scale of NaN comes to the zeros behind a row as well, where nothing is spoilt: k's whole
// row is NaN, and of v nobody takes these columns.
template <DType kType>
FASTATTN_DEVICE U32x4 dequantised_chunk(U32x2 numbers, float scale) {
  U32x4 chunk;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if constexpr (kType == DType::kFloat32) {
      chunk.x[word] = float_bits(dequantised(numbers.x[0], word, scale));
    } else {
      const uint32_t four = numbers.x[word / 2];
      chunk.x[word] =
          pack_pair<kType>(dequantised(four, word % 2 * 2, scale), dequantised(four, word % 2 * 2 + 1, scale));
    }
  }
  return chunk;
}

// Whether each row of a tile of kRows keys must be looked up by itself.
template <int kRows>
FASTATTN_DEVICE bool is_gathered(const AttentionParams& p) {
  return p.k_scale != nullptr || (p.block_table != nullptr && p.page_size % kRows != 0);
}

// Such a tile: of the keys from j0 on of sequence b those in [begin, keys), and zeros elsewhere, as load_tile leaves
// them beyond. What lies before a window may have been given away: its entries and its pages are not looked at.
template <class Tile, int kThreads>
FASTATTN_DEVICE void gather_cache_tile(SharedAddress base, const AttentionParams& p, const CacheTensor& t, int b,
                                       int hkv, int j0, int begin, int keys, int dim, bool is_aligned) {
  constexpr int kSize = kElementBytes<Tile::kType>, kElements = Tile::kElementsPerChunk;
  constexpr int kWork = Tile::kRows * Tile::kChunks;
  const bool is_int8 = t.scale != nullptr;
  const int size = is_int8 ? 1 : kSize;
  const char* const head = static_cast<const char*>(t.data) + hkv * t.stride[1] * size;
  // Addresses and numbers first, so that several of them are on their way at once; then what goes to shared memory.
  // Wide heads have few registers for them, but where a warp has 16 rows alone.
  constexpr bool kIsWide = Tile::kDim >= (kThreads == 32 ? 256 : 128);
  constexpr int kBatch = !kIsWide ? 4 : Tile::kRowBytes < 1024 ? 2 : 1;
#pragma unroll 1
  for (int first = thread_index(); first < kWork; first += kBatch * kThreads) {
    const char* src[kBatch];
    U32x2 numbers[kBatch];
    float scale[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int work = first + n * kThreads, row = work / Tile::kChunks, chunk = work % Tile::kChunks;
      src[n] = head;
      numbers[n] = {{0, 0}};
      scale[n] = 0.0f;
      if (work >= kWork || j0 + row < begin || j0 + row >= keys) continue;
      const CachePlace place = cache_place(p, b, j0 + row);
      src[n] += (place.batch * t.stride[0] + place.row * t.stride[2] + chunk * kElements) * size;
      if (is_int8) {
        scale[n] = t.scale[place.batch * t.scale_stride[0] + hkv * t.scale_stride[1] + place.row * t.scale_stride[2]];
        numbers[n] = load_numbers(src[n], kElements, dim - chunk * kElements, is_aligned);
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int work = first + n * kThreads, row = work / Tile::kChunks, chunk = work % Tile::kChunks;
      if (work >= kWork) continue;
      const int left = j0 + row >= begin && j0 + row < keys ? dim - chunk * kElements : 0;
      const SharedAddress dst = Tile::chunk_address(base, row, chunk);
      if (is_int8) {
        store_shared_u32x4(dst, dequantised_chunk<Tile::kType>(numbers[n], scale[n]));
      } else if (is_aligned) {
        cp_async_16(dst, src[n], left <= 0 ? 0 : left < kElements ? left * kSize : 16);
      } else {
        store_shared_u32x4(dst, gather_chunk<Tile>(src[n], left));
      }
    }
  }
}

}  // namespace fastattn::cuda
