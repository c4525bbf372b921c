// All that the C++ tests need of a framework: a check that says where it failed and counts, and the exit status.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace fastattn::testing {

inline long checks = 0, failures = 0;

// `describe` is called for a failure only; it prints the values that made it.
template <class Describe>
void check(bool holds, const char* text, const char* file, int line, Describe describe) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("%s:%d: failed: %s: ", file, line, text);
  describe();
  std::printf("\n");
  // A loop over a million shapes has shown what is wrong by then.
  if (failures == 50) {
    std::printf("50 failures: giving up\n");
    std::exit(1);
  }
}

inline int report(const char* name) {
  std::printf("%s: %ld checks, %ld failed\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace fastattn::testing

// CHECK(condition, "format", values...)
#define CHECK(condition, ...) \
  ::fastattn::testing::check((condition), #condition, __FILE__, __LINE__, [&] { std::printf(__VA_ARGS__); })
