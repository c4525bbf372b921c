#include "testing/emulator/fragments.h"

#include <bit>

namespace fastattn::emulator {
namespace {

#define FASTATTN_INLINE static inline __attribute__((always_inline))

FASTATTN_INLINE float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

FASTATTN_INLINE float half_to_float(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const uint32_t finite = std::bit_cast<uint32_t>(as_float(magnitude << 13) * 0x1p112f);
  return as_float(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : finite));
}

// The one or two numbers of a word.
template <MmaType kType>
FASTATTN_INLINE float low(uint32_t word) {
  if constexpr (kType == MmaType::kBf16) return as_float(word << 16);
  if constexpr (kType == MmaType::kF16) return half_to_float(word & 0xffffu);
  return as_float(word & ~0x1fffu);
}
template <MmaType kType>
FASTATTN_INLINE float high(uint32_t word) {
  if constexpr (kType == MmaType::kBf16) return as_float(word & 0xffff0000u);
  return half_to_float(word >> 16);
}

template <MmaType kType>
FASTATTN_INLINE void multiply(MmaOperands& o) {
  constexpr int kPerWord = kType == MmaType::kTf32 ? 1 : 2, kDepth = 8 * kPerWord;
  float a[16][kDepth], b[kDepth][8];
  for (int k = 0; k < 8; ++k) {
    for (int n = 0; n < 8; ++n) b[kPerWord * k][n] = low<kType>(o.b[k][n]);
    if constexpr (kPerWord == 2) {
      for (int n = 0; n < 8; ++n) b[2 * k + 1][n] = high<kType>(o.b[k][n]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 8; ++k) a[i][k] = low<kType>(o.a[i][k]);
    if constexpr (kPerWord == 2) {
      for (int k = 0; k < 8; ++k) a[i][8 + k] = high<kType>(o.a[i][k]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    float sum[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      const float x = a[i][k / kPerWord + k % kPerWord * 8];
      for (int n = 0; n < 8; ++n) sum[n] += x * b[k][n];
    }
    for (int n = 0; n < 8; ++n) o.c[i][n] += sum[n];
  }
}

template <MmaType kType>
void multiply_baseline(MmaOperands& o) {
  multiply<kType>(o);
}

#if defined(__x86_64__)
// A product of two such numbers is exact in float, so that a fused multiply-add gives the same bits.
template <MmaType kType>
__attribute__((target("avx2,fma"))) void multiply_avx2(MmaOperands& o) {
  multiply<kType>(o);
}
#endif

template <MmaType kType>
MmaFunction pick() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return multiply_avx2<kType>;
#endif
  return multiply_baseline<kType>;
}

}  // namespace

MmaFunction mma_function(MmaType type) {
  switch (type) {
    case MmaType::kBf16:
      return pick<MmaType::kBf16>();
    case MmaType::kF16:
      return pick<MmaType::kF16>();
    case MmaType::kTf32:
      break;
  }
  return pick<MmaType::kTf32>();
}

void transpose_8x8(const uint16_t* from, uint16_t* to) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * 8 + i] = from[i * 8 + j];
  }
}

}  // namespace fastattn::emulator
