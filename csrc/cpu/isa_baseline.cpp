// Level "baseline": any x86-64, and every other architecture.
#define FASTATTN_ISA baseline
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/baseline.h"

#include "cpu/instantiate.h"
