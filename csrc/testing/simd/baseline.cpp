// The vocabulary of level "baseline".
#include "testing/simd/levels.h"

#define FASTATTN_ISA baseline
#define FASTATTN_BF16_DOT 0

#include "cpu/simd/baseline.h"

#include "testing/simd/checks.h"
