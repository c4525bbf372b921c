#include "testing/emulator/fragments.h"

#include <bit>
#include <cstring>

#include "core/macros.h"

namespace fastattn::emulator {
namespace {

// Eight words of an operand, or eight columns of the result: one register or two, as the processor has them. By
// reference, because the ways to pass them by value differ with the instruction set.
using Words = uint32_t __attribute__((vector_size(32)));
using Row = float __attribute__((vector_size(32)));

FASTATTN_FN void copy(const void* from, void* to) { std::memcpy(to, from, sizeof(Row)); }

FASTATTN_FN void half_to_float(const Words& bits, Row& x) {
  const Words magnitude = bits & 0x7fffu, scaled = magnitude << 13;
  // The exponent's bias is still that of a half: exact for subnormal numbers as well. Infinities and NaNs need theirs.
  copy(&scaled, &x);
  x *= 0x1p112f;
  Words result;
  copy(&x, &result);
  result |= (Words)(magnitude >= 0x7c00u) & 0x7f800000u;
  result |= (bits & 0x8000u) << 16;
  copy(&result, &x);
}

// The one or two numbers of each word.
template <MmaType kType>
FASTATTN_FN void low(const Words& words, Row& x) {
  if constexpr (kType == MmaType::kF16) {
    half_to_float(words & 0xffffu, x);
  } else {
    const Words bits = kType == MmaType::kBf16 ? words << 16 : words & ~0x1fffu;
    copy(&bits, &x);
  }
}
template <MmaType kType>
FASTATTN_FN void high(const Words& words, Row& x) {
  if constexpr (kType == MmaType::kF16) {
    half_to_float(words >> 16, x);
  } else {
    const Words bits = words & 0xffff0000u;
    copy(&bits, &x);
  }
}

// c += x, rounded towards zero, as tensor cores have been seen to round what they accumulate: in a long sum that is a
// drift, where rounding to nearest would be a random walk.
FASTATTN_FN void add_towards_zero(Row& c, const Row& x) {
  Row sum = c + x;
  // What the rounding to nearest lost, exactly (Knuth's two-sum).
  const Row of_x = sum - c;
  const Row lost = (c - (sum - of_x)) + (x - of_x);
  const Words is_too_large = (Words)(((lost < 0.0f) & (sum > 0.0f)) | ((lost > 0.0f) & (sum < 0.0f)));
  Words bits;
  copy(&sum, &bits);
  bits += is_too_large;  // -1: the next number towards zero
  copy(&bits, &c);
}

// What multiplies and adds TF32 sums c and four products at once as numbers of a common exponent, the largest one's. Of
// each it keeps 24 bits from there on, and of the sum the leading 24, all cut off: never rounded. (Fasi, Higham,
// Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021, section 4; a bit more on later GPUs.) The
// products of 16-bit operands are summed in float below: what that leaves out is far below the rounding of their
// results.
constexpr int kTf32Products = 4;

using Integers = int32_t __attribute__((vector_size(32)));

FASTATTN_FN void add_aligned(Row& c, const Row (&products)[kTf32Products]) {
  constexpr uint32_t kExponent = 0x7f800000u;
  // Below, 2^24 over the largest number's power of two would not be finite; so small a sum may be lost.
  constexpr uint32_t kSmallest = 32u << 23;
  Words largest;
  copy(&c, &largest);
  largest &= kExponent;
  for (const Row& product : products) {
    Words exponent;
    copy(&product, &exponent);
    exponent &= kExponent;
    largest = exponent > largest ? exponent : largest;
  }
  const Words is_special = (Words)(largest == kExponent);  // an infinity or a NaN: as float arithmetic has it
  largest = largest < kSmallest ? Words{} + kSmallest : largest;
  const Words up_bits = (uint32_t{127 + 127 + 24} << 23) - largest, down_bits = largest - (24u << 23);
  Row up, down;  // 2^24 / 2^e and back
  copy(&up_bits, &up);
  copy(&down_bits, &down);
  Row plain = c;
  Integers sum = __builtin_convertvector(c * up, Integers);
  for (const Row& product : products) {
    plain += product;
    sum += __builtin_convertvector(product * up, Integers);
  }
  // |sum| < 5 * 2^25: up to four bits too many for a float.
  const Integers magnitude = sum < 0 ? -sum : sum;
  Integers kept = magnitude;
  for (int bit = 24; bit < 28; ++bit) {
    kept = magnitude >= (1 << bit) ? magnitude & -(1 << (bit - 23)) : kept;
  }
  Row result = __builtin_convertvector(sum < 0 ? -kept : kept, Row) * down;
  Words bits, plain_bits;
  copy(&result, &bits);
  copy(&plain, &plain_bits);
  bits = is_special ? plain_bits : bits;
  copy(&bits, &c);
}

template <MmaType kType>
FASTATTN_FN void multiply(MmaOperands& o) {
  constexpr int kPerWord = kType == MmaType::kTf32 ? 1 : 2;
  float a[16][kPerWord][8];  // [row][which of a word][word along k]
  Row b[8][kPerWord];
  for (int n = 0; n < 24; ++n) {
    Words words;
    copy(n < 16 ? o.a + 8 * n : o.b + 8 * (n - 16), &words);
    Row x[2];
    low<kType>(words, x[0]);
    if constexpr (kPerWord == 2) high<kType>(words, x[1]);
    for (int each = 0; each < kPerWord; ++each) {
      if (n < 16) {
        copy(&x[each], a[n][each]);
      } else {
        b[n - 16][each] = x[each];
      }
    }
  }
  if constexpr (kType == MmaType::kTf32) {
    for (int i = 0; i < 16; ++i) {
      Row c;
      std::memcpy(&c, o.c + 8 * i, sizeof(Row));
      for (int k0 = 0; k0 < 8; k0 += kTf32Products) {
        Row products[kTf32Products];
        for (int k = 0; k < kTf32Products; ++k) products[k] = a[i][0][k0 + k] * b[k0 + k][0];
        add_aligned(c, products);
      }
      std::memcpy(o.c + 8 * i, &c, sizeof(Row));
    }
    return;
  }
  // Four rows at a time: each sum waits for its own last product only.
  for (int i = 0; i < 16; i += 4) {
    Row sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    for (int k = 0; k < 8; ++k) {
      for (int each = 0; each < kPerWord; ++each) {
        sum0 += a[i][each][k] * b[k][each];
        sum1 += a[i + 1][each][k] * b[k][each];
        sum2 += a[i + 2][each][k] * b[k][each];
        sum3 += a[i + 3][each][k] * b[k][each];
      }
    }
    const Row sums[4] = {sum0, sum1, sum2, sum3};
    for (int row = 0; row < 4; ++row) {
      Row c;
      std::memcpy(&c, o.c + 8 * (i + row), sizeof(Row));
      add_towards_zero(c, sums[row]);
      std::memcpy(o.c + 8 * (i + row), &c, sizeof(Row));
    }
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

void transpose_8x8(const unsigned char* data, const uint32_t* at, uint32_t* to) {
  using Elements = uint16_t __attribute__((vector_size(16)));
  Elements x[8], y[8];
  for (int n = 0; n < 8; ++n) std::memcpy(&x[n], data + at[n], 16);
  // Interleaving row n with row n + 4 rotates the six bits of an element's place; three times make it the transpose's.
  for (int round = 0; round < 3; ++round) {
    for (int n = 0; n < 4; ++n) {
      y[2 * n] = __builtin_shufflevector(x[n], x[n + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * n + 1] = __builtin_shufflevector(x[n], x[n + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    std::memcpy(x, y, sizeof(x));
  }
  std::memcpy(to, x, sizeof(x));
}

}  // namespace fastattn::emulator
