// The vector vocabulary of every instruction set that this processor has: checks.h.
#include "cpu/attention.h"
#include "testing/simd/levels.h"

using namespace fastattn;

int main() {
  const struct {
    cpu::Isa isa;
    void (*check)();
  } levels[] = {
#define FASTATTN_LEVEL(enumerator, name) {cpu::Isa::enumerator, cpu::name::check_vocabulary},
      FASTATTN_LEVELS(FASTATTN_LEVEL)
#undef FASTATTN_LEVEL
  };
  for (const auto& level : levels) {
    const bool is_here = cpu::isa_supported(level.isa);
    std::printf("%s: %s\n", cpu::isa_name(level.isa), is_here ? "tested" : "SKIPPED, not supported by this processor");
    if (is_here) level.check();
  }
  return testing::report("simd_test");
}
