// What the tensor core and ldmatrix do with the registers of a whole warp, laid out as the matrices that they hold.
#pragma once

#include <cstdint>

#include "testing/emulator/primitives.h"

namespace fastattn::emulator {

// The operands of one mma. A 16-bit pair or a tf32 number makes one word: the same words for m16n8k16 and m16n8k8.
struct MmaOperands {
  alignas(64) uint32_t a[16 * 8];  // [row][word along k]
  alignas(64) uint32_t b[8 * 8];   // [word along k][column]
  alignas(64) float c[16 * 8];     // [row][column]; the result replaces it
};

// c += a b. Products are exact. Those of 16-bit operands are summed with rounding to nearest, and the sum is rounded
// once, towards zero, when it is added to c; those of TF32 are cut off at a common exponent: see fragments.cpp.
using MmaFunction = void (*)(MmaOperands&);
MmaFunction mma_function(MmaType type);  // for this processor; every choice gives the same bits

// Eight rows of eight 16-bit elements, at data + at[row], to the rows of the transpose.
void transpose_8x8(const unsigned char* data, const uint32_t* at, uint32_t* to);

}  // namespace fastattn::emulator
