// What checks the vector vocabulary of each level: checks.h.
//
// Included first by every file of the test, outside of any target region: what comes with it is baseline code.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>

#include "core/macros.h"
#include "cpu/levels.h"
#include "testing/check.h"
#include "testing/half.h"

namespace fastattn::cpu {

// baseline::check_vocabulary() and so on. Calls for a processor that has the level.
#define FASTATTN_DECLARE_CHECKS(enumerator, name) \
  namespace name {                                \
  void check_vocabulary();                        \
  }
FASTATTN_LEVELS(FASTATTN_DECLARE_CHECKS)
#undef FASTATTN_DECLARE_CHECKS

}  // namespace fastattn::cpu
