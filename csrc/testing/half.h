// bfloat16 and float16 as the tests need them: exact to float, and rounded to nearest even from float.
#pragma once

#include <bit>
#include <cstdint>

#include "core/macros.h"

namespace fastattn::testing {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTATTN_FN float to_float(float x) { return x; }

FASTATTN_FN float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

FASTATTN_FN float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction units of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 0x1f ? 0xffu : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

FASTATTN_FN void from_float(float x, float* out) { *out = x; }

FASTATTN_FN void from_float(float x, BFloat16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);  // stays a NaN when the low bits go
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

FASTATTN_FN void from_float(float x, Float16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Below the smallest normal number: adding 0.5 leaves units of 2^-24 in the last bits, rounded by the addition.
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace fastattn::testing
