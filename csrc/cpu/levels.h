// The levels of this architecture, in priority order: a level includes those before it. The one list of them: the
// enumeration, the names, the namespaces and the tables of kernels are made of it. A line is level(enumerator, name);
// csrc/cpu/isa_<name>.cpp is the level's code, and csrc/cpu/isa.cpp says whether the processor has it.
#pragma once

#include "core/macros.h"

#if defined(__x86_64__)
#define FASTATTN_LEVELS(level) \
  level(kBaseline, baseline) level(kAvx2, avx2) level(kAvx512, avx512) level(kAvx512Bf16, avx512_bf16)
#elif FASTATTN_HAS_NEON_BF16
#define FASTATTN_LEVELS(level) level(kBaseline, baseline) level(kNeon, neon) level(kNeonBf16, neon_bf16)
#elif defined(__aarch64__)
#define FASTATTN_LEVELS(level) level(kBaseline, baseline) level(kNeon, neon)
#else
#define FASTATTN_LEVELS(level) level(kBaseline, baseline)
#endif
